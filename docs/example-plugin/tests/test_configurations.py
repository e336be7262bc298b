"""The configuration files beside this folder work: the plugin is found by its kinds."""

from pathlib import Path

import oodcore
from oodcore.config import DetectorConfig, read, validate
from oodcore.training_config import TrainingConfig

HERE = Path(__file__).parents[1]


def test_the_plugin_is_found():
    [plugin] = [p for p in oodcore.registry.plugins() if p.distribution == "oodcore-example"]
    assert plugin.error is None
    assert set(plugin.components) == {
        ("statistic", "class_directions"),
        ("scorer", "nearest_direction"),
        ("shaper", "typical_range"),
        ("regularizer", "confidence_penalty"),
    }


def test_a_detector_is_fitted_saved_and_loaded(tmp_path):
    config = validate(DetectorConfig, read(HERE / "detector.yaml"))
    detector = oodcore.Detector.from_config(HERE / "detector.yaml")
    detector.fit(config.train.open()).calibrate(config.calibrate.open(), config.false_alarm_rate)
    detector.save(tmp_path / "artifact")
    loaded = oodcore.load(tmp_path / "artifact", allow=["oodcore_plugins.networks:digits_cnn"])
    known = config.calibrate.open()
    assert (loaded.score(known) == detector.score(known)).all()
    assert (loaded.predict(known) == -1).mean() <= config.false_alarm_rate


def test_a_training_run_is_configured():
    config = validate(TrainingConfig, read(HERE / "training.yaml"))
    [regularizer] = config.regularizers
    assert regularizer.kind == "confidence_penalty"
