"""A stand-in for gcloud: one TPU, its states read from a file, its worker a folder on this machine.

FAKE_GCLOUD names a folder: `calls` receives one JSON list per call; `state.json` holds `state` (""
if there is no TPU), `queue`, the states still to come, one per poll, `lives`, the queues of TPUs to
be created, and `fail`, commands that fail. Scripts sent by ssh really run, with `home` as their
home folder. A TPU that is lost loses its home.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

folder = pathlib.Path(os.environ["FAKE_GCLOUD"])
home = folder / "home"
args = sys.argv[1:]
with (folder / "calls").open("a") as calls:
    calls.write(json.dumps(["gcloud", *args]) + "\n")
state = json.loads((folder / "state.json").read_text())
verb = args[3]


def fail(text):
    sys.exit(f"ERROR: (gcloud.compute.tpus) {text}")


def lose():
    if (home / "lm/run.pid").exists():
        os.killpg(int((home / "lm/run.pid").read_text()), signal.SIGKILL)
    shutil.rmtree(home, ignore_errors=True)


if verb in state.get("fail", []):
    fail("UNAVAILABLE: try again")
if verb == "create":
    if state["state"]:
        fail("ALREADY_EXISTS")
    home.mkdir(exist_ok=True)
    state["state"] = "WAITING_FOR_RESOURCES"
    state["queue"] = state["lives"].pop(0)
elif verb == "describe":
    if state["queue"]:
        state["state"] = state["queue"].pop(0)
        if state["state"] in ("SUSPENDED", "PREEMPTED"):
            lose()
    if not state["state"]:
        fail("NOT_FOUND: Resource was not found")
    print(state["state"])
elif verb == "delete":
    lose()
    state["state"], state["queue"] = "", []
elif verb == "scp":
    if state["state"] not in ("ACTIVE", "READY"):
        fail("the TPU is not there")
    shutil.copy(args[4], home / args[5].partition(":")[2])
elif verb == "ssh":
    if state["state"] not in ("ACTIVE", "READY"):
        fail("the TPU is not there")
    script = next(a for a in args if a.startswith("--command=")).partition("=")[2]
    if "pip install" not in script:
        result = subprocess.run(
            ["sh", "-c", script], cwd=home, env={**os.environ, "HOME": str(home)}
        )
        if result.returncode:
            sys.exit(result.returncode)
(folder / "state.json").write_text(json.dumps(state))
