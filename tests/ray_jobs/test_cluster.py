"""The cluster examples: fields that belong together agree, flags exist, nothing secret is inlined,
and the Slurm script runs.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import typer
import yaml

from rellax_ds.artifacts import WorkDir
from rellax_ds.cli import app
from rellax_ds.config import load_recipe
from rellax_ds.testing import tiny_recipe

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "ray_jobs" / "cluster"
SBATCH = FOLDER / "data_path.sbatch"
DOCUMENTS = list(yaml.safe_load_all((FOLDER / "rayjob.yaml").read_text()))


def kind(name: str) -> dict[str, Any]:
    (document,) = [d for d in DOCUMENTS if d["kind"] == name]
    return dict(document)


JOB = kind("RayJob")["spec"]
CLUSTER = JOB["rayClusterSpec"]
GROUPS = CLUSTER["workerGroupSpecs"]
PODS = {
    "head": CLUSTER["headGroupSpec"]["template"],
    **{group["groupName"]: group["template"] for group in GROUPS},
}


def run_flags() -> set[str]:
    command = typer.main.get_command(app).commands["run"]  # type: ignore[attr-defined]
    return {flag for parameter in command.params for flag in parameter.opts}


def test_rayjob_entrypoint_is_a_driver_of_ours_with_flags_that_exist() -> None:
    words = shlex.split(JOB["entrypoint"])
    script = words[1].removeprefix("/opt/rellax-ds/")
    assert (ROOT / script).is_file()
    assert {word for word in words if word.startswith("--")} <= run_flags()
    load_recipe(words[words.index("--recipe") + 1])


def test_rayjob_ends_by_itself_and_is_tried_again() -> None:
    assert JOB["submissionMode"] == "K8sJobMode"
    assert JOB["backoffLimit"] >= 1
    assert 0 < JOB["activeDeadlineSeconds"] <= 86400
    assert JOB["shutdownAfterJobFinishes"]
    assert JOB["ttlSecondsAfterFinished"] > 0


def test_rayjob_is_closed_to_the_network() -> None:
    assert CLUSTER["authOptions"] == {"mode": "token"}
    assert CLUSTER["headGroupSpec"]["serviceType"] == "ClusterIP"
    policy = kind("NetworkPolicy")["spec"]
    selected = policy["podSelector"]["matchLabels"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    templates = [*PODS.values(), JOB["submitterPodTemplate"]]
    assert all(t["metadata"]["labels"].items() >= selected.items() for t in templates)
    assert not [t for t in templates if t["spec"]["automountServiceAccountToken"]]
    assert all("from" in rule for rule in policy["ingress"])
    assert all("to" in rule for rule in policy["egress"])
    text = (FOLDER / "rayjob.yaml").read_text()
    assert not re.search(r"LoadBalancer|NodePort|hostNetwork|privileged", text)


def test_rayjob_numbers_and_images_agree() -> None:
    pins = (ROOT / "requirements" / "constraints.txt").read_text()
    assert re.search(rf"^ray(\[.*\])?=={re.escape(CLUSTER['rayVersion'])}$", pins, re.MULTILINE)
    containers = [c for pod in PODS.values() for c in pod["spec"]["containers"]]
    containers += JOB["submitterPodTemplate"]["spec"]["containers"]
    assert len({c["image"] for c in containers}) == 1
    assert all(c["resources"]["requests"] == c["resources"]["limits"] for c in containers)
    for group in GROUPS:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    cpu, gpu = GROUPS
    assert cpu["replicas"] >= 1
    (worker,) = cpu["template"]["spec"]["containers"]
    assert JOB["entrypointNumCpus"] <= int(worker["resources"]["limits"]["cpu"])
    assert CLUSTER["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in worker["resources"]["limits"]
    assert "nvidia.com/gpu" in gpu["template"]["spec"]["containers"][0]["resources"]["limits"]


@pytest.mark.parametrize("pod", PODS.values(), ids=PODS)
def test_rayjob_pods_share_the_volume_that_holds_work_and_cache(pod: dict[str, Any]) -> None:
    claim = kind("PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    (volume,) = pod["spec"]["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    (container,) = pod["spec"]["containers"]
    (mount,) = container["volumeMounts"]
    assert mount["name"] == volume["name"]
    root = mount["mountPath"] + "/"
    words = shlex.split(JOB["entrypoint"])
    assert words[words.index("--work-dir") + 1].startswith(root)
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment["RELLAX_CACHE"].startswith(root)


def test_examples_inline_no_secret() -> None:
    for path in (FOLDER / "rayjob.yaml", SBATCH):
        text = path.read_text()
        assert not re.search(r"(?i)(password|api_key|secret_key|wandb_api|hf_token)", text)
        assert not re.search(r"\b[0-9a-f]{32,}\b", text)
        assert not re.search(r"RAY_AUTH_TOKEN=['\"]?\w", text)


def test_sbatch_parses_and_keeps_what_a_stopped_job_needs() -> None:
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)
    text = SBATCH.read_text()
    directives = re.findall(r"^#SBATCH --([\w-]+)", text, re.MULTILINE)
    assert {"nodes", "ntasks-per-node", "cpus-per-task", "time", "signal"} <= set(directives)
    assert "RAY_AUTH_MODE=token" in text
    assert "--dashboard-host=127.0.0.1" in text
    assert re.search(r"^trap .* TERM", text, re.MULTILINE)
    (call,) = re.findall(r"ray_jobs/pipeline\.py((?:[^&]|\\\n)*)&", text)
    assert set(re.findall(r"--[\w-]+", call)) <= run_flags()


def test_sbatch_starts_ray_with_flags_that_exist() -> None:
    from ray.scripts.scripts import start

    known = {flag for parameter in start.params for flag in parameter.opts}
    known |= {"--nodes", "--ntasks", "--nodelist", "--exclude", "--overlap"}  # srun's
    text = SBATCH.read_text()
    calls = re.findall(r"^ *srun (.*?) &$", text, re.MULTILINE | re.DOTALL)
    calls += re.findall(r"^ray_node=\((.*)\)$", text, re.MULTILINE)
    assert len(calls) == 3
    assert {flag for call in calls for flag in re.findall(r"--[\w-]+", call)} <= known


@pytest.mark.ray
@pytest.mark.slow_soak
def test_sbatch_on_two_nodes_commits_the_stage_and_ends_its_ray(tmp_path: Path) -> None:
    """Slurm's commands are stood in for by scripts that run everything on this machine."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    fakes = {
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "scontrol": "echo localhost",
        "hostname": "echo 127.0.0.1",
    }
    for name, body in fakes.items():
        (binaries / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (binaries / name).chmod(0o755)
    work = tmp_path / "work"
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHON": sys.executable,
        "RECIPE": str(tiny_recipe(tmp_path / "tiny", embeddings={"encoder": "backbone"})),
        "UNTIL": "embeddings",
        "WORK_DIR": str(work),
        "RELLAX_CACHE": str(tmp_path / "cache"),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "1",
        "SBATCH_MARK": str(tmp_path),
    }
    done = subprocess.run(
        ["bash", str(SBATCH)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "ray: 2 of 2 nodes" in done.stdout
    assert "joined the cluster" in done.stderr
    assert WorkDir(work).require("embeddings").counts["items"] == 60
    marked = [
        p
        for p in psutil.process_iter(["environ"])
        if (p.info["environ"] or {}).get("SBATCH_MARK") == str(tmp_path)
    ]
    _, alive = psutil.wait_procs(marked, timeout=20)
    assert not alive
