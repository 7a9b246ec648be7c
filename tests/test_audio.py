"""Recordings in every layout that is read, and what is said of those that are not."""

import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile
from sounds import tone, write_clips, write_karaoke

from support import audio

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
MIR1K = SHARED / "mir1k_subset"
EXCERPTS = SHARED / "musdb_excerpts"


def only(folder):
    (recording,) = audio.find_recordings(folder)
    return recording


# --- layouts ---


def write_hq(folder, seconds=1.0, rate=44_100):
    folder.mkdir(parents=True)
    sources = {
        name: tone(100 * (i + 1), seconds, rate, channels=2)
        for i, name in enumerate(("drums", "bass", "other", "vocals"))
    }
    for name, samples in sources.items():
        soundfile.write(folder / f"{name}.wav", samples, rate, "FLOAT")
    return sources


def test_musdb18_hq_is_read_with_all_but_the_vocals_as_the_accompaniment(tmp_path):
    sources = write_hq(tmp_path / "Someone - A Song")
    recording = only(tmp_path)
    assert (recording.name, recording.artist) == ("Someone - A Song", "Someone")
    assert len(recording.files()) == 4
    samples, rate = recording.read()
    assert rate == 44_100
    assert samples.shape == (2, 44_100, 2)
    assert samples.dtype == np.float32
    np.testing.assert_array_equal(samples[1], sources["vocals"])
    accompaniment = sources["drums"] + sources["bass"] + sources["other"]
    np.testing.assert_allclose(samples[0], accompaniment, atol=1e-6)


def test_karaoke_files_have_the_accompaniment_on_the_left(tmp_path):
    written = write_karaoke(tmp_path / "amy_10_03.flac")
    recording = only(tmp_path)
    assert (recording.name, recording.song, recording.artist) == ("amy_10_03", "amy_10", "amy")
    samples, rate = recording.read()
    assert (samples.shape, rate) == ((2, 32_000, 1), 16_000)
    np.testing.assert_allclose(samples[..., 0], written.T, atol=2**-15)  # 16 bits


def test_folders_of_two_files_are_read(tmp_path):
    folder = tmp_path / "Someone - A Song"
    folder.mkdir()
    for name, frequency in (("accompaniment_true.mp3", 200), ("vocals_true.mp3", 1500)):
        soundfile.write(folder / name, tone(frequency, 1.0, 44_100, 2), 44_100, format="MP3")
    samples, rate = only(tmp_path).read()
    assert rate == 44_100
    for source, frequency in zip(samples, (200, 1500), strict=True):
        loudest = np.abs(np.fft.rfft(source[:44_100, 0])).argmax()  # in bins of 1 Hz
        assert loudest == pytest.approx(frequency, abs=3)


def write_stems(path, number=5, rate=44_100):
    av = pytest.importorskip("av", reason="needs PyAV to write an MP4")
    with av.open(str(path), "w", format="mp4") as container:
        streams = [container.add_stream("aac", rate=rate, layout="stereo") for _ in range(number)]
        for i, stream in enumerate(streams):
            planes = np.ascontiguousarray(tone(300 * (i + 1), 1.0, rate, 2).T)
            for start in range(0, planes.shape[1], 1024):
                piece = np.ascontiguousarray(planes[:, start : start + 1024])
                frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout="stereo")
                frame.rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))


def levels(samples, frequencies, rate=44_100):
    """The amplitudes of tones in the first half second, with bins of 2 Hz."""
    spectrum = np.abs(np.fft.rfft(samples[: rate // 2, 0])) / (rate // 4)
    return [spectrum[f // 2 - 1 : f // 2 + 2].max() for f in frequencies]


def test_stems_are_read_in_the_order_mixture_drums_bass_other_vocals(tmp_path):
    write_stems(tmp_path / "Someone - A Song.stem.mp4")
    recording = only(tmp_path)
    assert recording.name == "Someone - A Song"
    samples, rate = recording.read()
    assert (len(samples), samples.shape[2], rate) == (2, 2, 44_100)
    tones = (300, 600, 900, 1200, 1500)
    # lossy, and the encoder's first samples are silent
    assert levels(samples[0], tones) == pytest.approx([0, 0.2, 0.2, 0.2, 0], abs=0.03)
    assert levels(samples[1], tones) == pytest.approx([0, 0, 0, 0, 0.2], abs=0.03)
    mixture, _ = audio.read_mixture(tmp_path / "Someone - A Song.stem.mp4")
    assert levels(mixture, tones) == pytest.approx([0.2, 0, 0, 0, 0], abs=0.03)


def test_stems_without_pyav_say_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a - b.stem.mp4").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(SystemExit, match=r"needs PyAV .*factordisc\[stems\].*MUSDB18-HQ"):
        only(tmp_path).read()


# --- what cannot be read ---


def test_stems_with_too_few_streams_are_refused(tmp_path):
    write_stems(tmp_path / "a - b.stem.mp4", number=2)
    with pytest.raises(ValueError, match=r"expects 5 audio streams .* but has 2"):
        only(tmp_path).read()


def test_folders_without_recordings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        audio.find_recordings(tmp_path / "nowhere")
    (tmp_path / "a song").mkdir()
    (tmp_path / "a song" / "drums.wav").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expects folders of songs .* but has none"):
        audio.find_recordings(tmp_path)


def test_karaoke_files_of_one_channel_are_refused(tmp_path):
    soundfile.write(tmp_path / "amy_1_01.wav", tone(200, 1, 16_000), 16_000)
    with pytest.raises(ValueError, match="two channels, accompaniment and vocals, but has 1"):
        only(tmp_path).read()


def test_files_that_do_not_fit_each_other_are_refused(tmp_path):
    write_hq(tmp_path / "a - b")
    soundfile.write(tmp_path / "a - b" / "bass.wav", tone(100, 0.5, 44_100, 2), 44_100)
    with pytest.raises(ValueError, match=r"one length.*bass\.wav \(22050, 2\) at 44100 Hz"):
        only(tmp_path).read()


def test_files_that_are_no_sound_are_refused(tmp_path):
    (tmp_path / "amy_1_01.wav").write_bytes(b"no sound")
    with pytest.raises(ValueError, match=r"amy_1_01\.wav expects a sound file: "):
        only(tmp_path).read()


# --- training and test ---


def test_the_folders_train_and_test_are_taken_for_what_they_are(tmp_path):
    write_karaoke(tmp_path / "train" / "amy_1_01.wav")
    write_karaoke(tmp_path / "test" / "amy_2_01.wav")
    train, test = audio.split_recordings(tmp_path)
    assert [r.name for r in train] == ["amy_1_01"]
    assert [r.name for r in test] == ["amy_2_01"]


def test_else_a_fourth_of_the_artists_is_kept_for_testing(tmp_path):
    write_clips(tmp_path, singers=8, songs=2, seconds=0.1)
    train, test = audio.split_recordings(tmp_path)
    assert (len(train), len(test)) == (12, 4)
    assert not {r.artist for r in train} & {r.artist for r in test}
    assert audio.split_recordings(tmp_path) == (train, test)


def test_recordings_of_one_artist_cannot_be_divided(tmp_path):
    write_clips(tmp_path, singers=1, seconds=0.1)
    with pytest.raises(ValueError, match="at least two artists to divide, but all are by 'singe"):
        audio.split_recordings(tmp_path)


# --- signals ---


def test_resampling_keeps_tones_and_changes_the_number_of_samples():
    signals = np.stack([tone(440, 1.0, 44_100)[:, 0], tone(880, 1.0, 44_100)[:, 0]])
    changed = audio.resampled(signals, 44_100, 22_050)
    assert changed.shape == (2, 22_050)
    expected = np.stack([tone(440, 1.0, 22_050)[:, 0], tone(880, 1.0, 22_050)[:, 0]])
    # the filter has no neighbours at the ends
    np.testing.assert_allclose(changed[:, 500:-500], expected[:, 500:-500], atol=1e-4)


def test_mono_is_the_mean_of_the_channels():
    assert audio.mono(np.array([[[1.0, 3.0], [2.0, 2.0]]])).tolist() == [[2.0, 2.0]]


def test_written_audio_is_read_again_and_clipped(tmp_path):
    samples = np.array([0.5, -0.25, 1.5, -3.0], np.float32)
    audio.write_audio(tmp_path / "new" / "a.wav", samples, 16_000)
    read, rate = audio.read_mixture(tmp_path / "new" / "a.wav")
    assert rate == 16_000
    np.testing.assert_allclose(read[:, 0], [0.5, -0.25, 1, -1], atol=2**-14)


# --- real recordings ---


@pytest.mark.skipif(not MIR1K.exists(), reason="needs the MIR-1K clips in ../shared/data")
def test_clips_of_mir1k_are_known_by_singer_and_song():
    train, test = audio.split_recordings(MIR1K)
    assert len(train) + len(test) == 76
    assert len({r.artist for r in train}) == 15
    assert len({r.artist for r in test}) == 4
    by_name = {r.name: r for r in train + test}
    # four clips of one song
    assert {by_name[f"tammy_1_0{i}"].song for i in (1, 3, 5, 7)} == {"tammy_1"}
    assert by_name["amy_10_01"].artist == "amy"


@pytest.mark.skipif(not EXCERPTS.exists(), reason="needs the MUSDB18 songs in ../shared/data")
def test_sources_of_a_real_stem_file_add_up_to_its_mixture():
    pytest.importorskip("av", reason="needs PyAV to read an MP4")
    recording = {r.name: r for r in audio.find_recordings(EXCERPTS)}["Music Delta - 80s Rock"]
    sources, rate = recording.read()
    mixture, _ = audio.read_mixture(recording.path)
    assert rate == 44_100
    error = ((sources.sum(0) - mixture) ** 2).mean() / (mixture**2).mean()
    assert error < 1e-3  # each stream is compressed by itself
