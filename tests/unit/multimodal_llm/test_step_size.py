"""A micro-batch that does not fit this machine's memory by the plan."""

from __future__ import annotations

import pytest
import yaml

from seed_multimodal.errors import ConfigError


def test_check_machine_refuses_a_batch_that_does_not_fit_the_memory(runs, train, tmp_path):
    runs.write_files(tmp_path / "files")
    data = yaml.safe_load((tmp_path / "files" / "data.yaml").read_text())
    for packing in (True, False):
        sources = [{**source, "batch_size": 10**8} for source in data["sources"]]
        with pytest.raises(ConfigError, match=r"a micro-batch of [\d,]+ positions needs [\d,]+ GiB, and this machine "
                           r"has .*lower rows \(or batch_size\)"):
            train("large", data={**data, "sources": sources, "rows": 10**8, "packing": packing})
