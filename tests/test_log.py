"""RunLog: what TensorBoard gets, and what a run leaves of it."""

import threading

from mopro_fast.training.log import RunLog


def test_tensorboard_has_everything_by_a_save_and_leaves_no_hook(tmp_path):
    hook = threading.excepthook
    log = RunLog(tmp_path, True, 0, 0, tensorboard=True)
    log.entry("train", 0, 1, 1, {"a_name_of_a_value": 1.0})
    log.flush()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/a_name_of_a_value" in events.read_bytes()
    assert threading.excepthook is not hook
    log.close()
    assert threading.excepthook is hook
    log.close()


def test_without_tensorboard_there_is_nothing_to_flush(tmp_path):
    for active in (True, False):
        log = RunLog(tmp_path, active, 0, 0, tensorboard=False)
        log.flush()
        log.close()
