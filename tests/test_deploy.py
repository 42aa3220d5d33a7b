"""The templates in deploy/: every command parses, the shares of a job are all of them, the files are well formed."""

import re
import shlex
import subprocess

import pytest
import yaml

from tests.test_house import ROOT, parse

FILES = sorted((ROOT / "deploy").iterdir())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_commands_parse(file):
    """With the variables that the scheduler sets, as the last of the shares."""
    text = file.read_text().replace("\\\n", " ")
    values = {"SHARE": "15/16", "JOB_COMPLETION_INDEX": "15", "VERB": "resume /runs/mine"}
    for name, value in values.items():
        text = text.replace(f"${name}", value)
    commands = re.findall(
        r"(?:^|[\s\"=])(?:diptych|-m diptych) ((?:train|resume|evaluate|generate|data) [^\"\n&]*)", text
    )
    commands += re.findall(r"VERB=\"([^\"]*)\"", text)
    assert commands
    for command in commands:
        parse(shlex.split(command.strip()))


def test_slurm():
    file = ROOT / "deploy" / "slurm-array.sh"
    subprocess.run(["bash", "-n", file], check=True)
    options = shlex.split(" ".join(re.findall(r"^#SBATCH (.*)$", file.read_text(), re.M)))
    assert "--array=0-15" in options and "--requeue" in options
    script = file.read_text().replace("srun diptych", "echo")
    shares = [
        subprocess.run(
            ["bash", "-c", script],
            env={"SLURM_ARRAY_TASK_ID": str(i), "SLURM_ARRAY_TASK_COUNT": "16", "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()[-1]
        for i in (0, 15)
    ]
    assert shares == ["0/16", "15/16"]


def test_kubernetes():
    job = yaml.safe_load((ROOT / "deploy" / "kubernetes-job.yaml").read_text())
    spec = job["spec"]
    assert (job["apiVersion"], job["kind"], spec["completionMode"]) == ("batch/v1", "Job", "Indexed")
    pod = spec["template"]["spec"]
    container = pod["containers"][0]
    assert pod["restartPolicy"] == "Never", "backoffLimitPerIndex needs it"
    assert container["args"][0].endswith(f"--shard $JOB_COMPLETION_INDEX/{spec['completions']}")
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_skypilot():
    task = yaml.safe_load((ROOT / "deploy" / "skypilot.yaml").read_text())
    known = {"name", "workdir", "num_nodes", "resources", "file_mounts", "setup", "run"}
    assert task.keys() <= known and re.fullmatch(r"\w+:\d+", task["resources"]["accelerators"])
    subprocess.run(["bash", "-n"], input=task["run"], text=True, check=True)
