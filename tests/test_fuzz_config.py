"""Whatever a config.json holds, it is read or refused in one line. MOPRO_FAST_FUZZ: how many inputs."""

import os

import pytest
from fuzz_config import mutated

from mopro_fast.config import TrainConfig, from_dict, load, read
from mopro_fast.errors import UserError

INPUTS = int(os.environ.get("MOPRO_FAST_FUZZ", 100))
GROUPS = 4


@pytest.mark.parametrize("group", range(GROUPS))
def test_a_config_is_read_or_refused_in_one_line(group, tmp_path):
    path, results = tmp_path / "config.json", []
    for seed in range(group, INPUTS, GROUPS):
        path.write_bytes(mutated(seed))
        try:
            config = load(path)
        except UserError as error:
            assert str(error).isprintable() and str(path) in str(error) and len(str(error)) < 1500, (seed, error)
            results.append("refused")
            continue
        results.append("read")
        path.write_text(config.to_json())
        assert load(path) == config, seed
        assert from_dict(TrainConfig, read(path), "again") == config, seed
    assert len(results) < 20 or set(results) == {"refused", "read"}
