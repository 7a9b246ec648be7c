"""What every benchmark shares."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """Networks this small only wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
