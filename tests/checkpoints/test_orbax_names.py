"""The names inside Orbax that checkpoints rest on; a failure here says which one a version broke.

What to do then: change the constant named, or go back below the version (setup.cfg has the bound).
"""

import asyncio
import inspect

import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from lm.checkpoints import Checkpoints, arrays, checksums


def test_what_checkpoints_take_from_orbax(tmp_path, monkeypatch):
    handler = ocp.CompositeCheckpointHandler
    assert asyncio.iscoroutinefunction(handler.async_save), "arrays.Handler.async_save overrides it"
    assert list(inspect.signature(handler.async_save).parameters)[:3] == [
        "self",
        "directory",
        "args",
    ]
    assert list(inspect.signature(handler.finalize).parameters) == ["self", "directory"], (
        "arrays.Handler.finalize overrides it, to add checksums"
    )
    seen: dict[str, list[str]] = {}

    def look(self, directory, seal=arrays.Handler._seal):
        seen["folder"] = [epath.Path(directory).name]
        seen["files"] = checksums.files(epath.Path(directory))
        seal(self, directory)

    monkeypatch.setattr(arrays.Handler, "_seal", look)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(3)}, {}, wait=True)
        assert checkpoints.failures() == []
    assert seen, "finalize is not called before a checkpoint gets its final name"
    assert arrays.PARTIAL in seen["folder"][0], f"arrays.PARTIAL is not part of {seen['folder']}"
    own = f"/{arrays.OWN_FOLDER.format(0)}/"
    assert any(own in file for file in seen["files"]), (
        f"arrays.OWN_FOLDER is not in {seen['files']}"
    )
    after = {path.name for path in (tmp_path / "1").iterdir() if path.is_file()}
    late = after - {*seen["files"], checksums.FILE, "model.json", "metadata.json"}
    assert late == set(checksums.NOT_SUMMED) - {checksums.FILE}, (
        f"checksums.NOT_SUMMED are the files that Orbax adds while renaming, which are {late}"
    )
