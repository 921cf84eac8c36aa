"""Settings of a training run: every mistake is named, and the schedule does what it says."""

import pytest

from tests.train.tiny_run import tiny_settings
from ztok_fast.codec.config import ConfigError
from ztok_fast.train.settings import SettingsError, TrainSettings


def defaults(**changed):
    return TrainSettings(**({"base": "b", "out": "o", "train_files": ["t.jsonl"]} | changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"steps": 2.5}, "steps: expected int, got 2.5"),
        ({"steps": True}, "steps: expected int, got True"),
        ({"learning_rate": "1e-3"}, r"learning_rate: expected float, got '1e-3' \(write it with a decimal point\)"),
        ({"learning_rate": 0}, "learning_rate: expected a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a number above 0"),
        ({"gradient_clip": 0.0}, "gradient_clip: expected a number above 0"),
        ({"checkpoint_every": 0}, "checkpoint_every: expected at least 1"),
        ({"noise": 1.5}, r"noise: expected a share in \[0, 1\], got 1.5"),
        ({"sampling_start": 1.0}, "sampling_start: expected less than 1, so that some steps draw"),
        ({"precision": "half"}, "precision: expected one of auto, bfloat16, float32, got .half."),
        ({"max_minutes": -1}, "max_minutes: expected at least 0"),
        ({"train_files": []}, "train_files: expected at least one file"),
        ({"train_files": "t.jsonl"}, "train_files: expected list"),
        ({"steps": 10, "continuous_steps": 10}, "continuous_steps: expected fewer than steps"),
        ({"loss": {"beauty": 1.0}}, "loss: expected known terms, got .'beauty'"),
    ],
)
def test_bad_settings_are_named(changed, message):
    with pytest.raises(SettingsError, match=message):
        defaults(**changed)


def test_bad_codec_settings_and_weights_are_named_at_once():
    with pytest.raises(ConfigError, match="latent_dim"):
        defaults(codec={"latent_dim": 0})
    with pytest.raises(ValueError, match="loss weight usage"):
        defaults(loss={"usage": -1})


def test_default_settings_really_sample():
    settings = defaults()
    drawn = [settings.phase(step).sampling for step in range(settings.steps)]
    assert max(drawn) > 0.9 * settings.sampling
    late = drawn[int(settings.steps * settings.sampling_start) :]
    assert sum(p > 0 for p in late) == pytest.approx(len(late) / settings.sampling_every, abs=1)
    assert not any(drawn[: int(settings.steps * settings.sampling_start) - 1])
    assert not any(defaults(sampling=0.0, sampling_start=1.0).phase(step).sampling for step in range(2000))


def test_phases_of_the_default_run():
    settings = defaults()
    phases = [settings.phase(step) for step in range(settings.steps)]
    blends = [phase.blend for phase in phases]
    assert blends[: settings.continuous_steps] == [0.0] * settings.continuous_steps
    assert blends == sorted(blends) and blends[settings.continuous_steps] > 0
    assert blends[settings.continuous_steps + settings.blend_steps - 1] == 1.0 == blends[-1]
    assert [p.predicted_mass for p in phases] == [step >= settings.surprisal_steps for step in range(settings.steps)]
    assert phases[0].noise == settings.noise and phases[-1].noise == pytest.approx(settings.noise_end, abs=1e-3)
    assert phases[0].level_dropout == 0 and phases[-1].level_dropout == settings.level_dropout
    assert len({phase.seed for phase in phases}) == settings.steps


def test_density_is_computed_as_often_as_asked():
    settings = defaults(density_every=3)
    assert [settings.phase(step).density for step in range(6)] == [True, False, False, True, False, False]


def test_learning_rate_warms_up_and_falls_to_a_twentieth():
    settings = defaults(steps=500, warmup_steps=20)
    factors = [settings.learning_rate_factor(step) for step in range(501)]
    assert factors[0] == 1 / 20 and factors[19] == factors[20] == 1.0
    assert factors[20:] == sorted(factors[20:], reverse=True) and factors[500] == pytest.approx(0.05)
    assert defaults(warmup_steps=0).learning_rate_factor(0) == 1.0


def test_yaml_round_trip(tmp_path):
    (tmp_path / "run.yaml").write_text("base: b\nout: o\ntrain_files: [t.jsonl]\nsteps: 900\ncodec: {latent_dim: 8}\n")
    settings = TrainSettings.load(tmp_path / "run.yaml")
    assert settings == defaults(steps=900, codec={"latent_dim": 8})
    assert settings.codec_config().latent_dim == 8 and settings.codec_config().base_model == "b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: b\nout: o\n", "expected the settings .'train_files'"),
        ("base: b\nout: o\ntrain_files: [t]\nstep: 3\n", "got unknown .'step'"),
        ("- base\n", "expected a mapping, got list"),
        ("base: [\n", "expected YAML"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SettingsError, match=message):
        TrainSettings.load(tmp_path / "run.yaml")


def test_missing_yaml(tmp_path):
    with pytest.raises(SettingsError, match="expected an existing YAML file"):
        TrainSettings.load(tmp_path / "none.yaml")


def test_settings_of_the_tests_draw_every_kind_of_step(tmp_path):
    phases = [tiny_settings(tmp_path).phase(step) for step in range(8)]
    assert {p.blend for p in phases} == {0.0, 0.5, 1.0} and any(p.sampling for p in phases)
    assert {p.predicted_mass for p in phases} == {True, False} and any(p.level_dropout for p in phases)
