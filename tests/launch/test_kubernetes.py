"""The manifests that kubernetes.sh makes are JobSets, and say what was asked for."""

import pytest

yaml = pytest.importorskip("yaml")

TPU = ("--name=a", "--image=registry/lmjax:1", "--accelerator=tpu-v5-lite-podslice", "--topology=4x8", "--slices=2")
GPU = ("--name=a", "--image=registry/lmjax:1", "--accelerator=nvidia-h100-80gb", "--hosts=3", "--retries=4")
SWEEP = ("--name=a", "--image=registry/lmjax:1", "--accelerator=nvidia-l4", "--chips=1", "--workers=8",
         "--volume=claim")
# What jobset.x-k8s.io/v1alpha2 has and must have, by api/jobset/v1alpha2/jobset_types.go; the rest is Kubernetes' own.
FIELDS = {
    "spec": ({"replicatedJobs", "network", "successPolicy", "failurePolicy", "startupPolicy", "suspend", "coordinator",
              "managedBy", "ttlSecondsAfterFinished", "volumeClaimPolicies"}, set()),
    "network": ({"enableDNSHostnames", "subdomain", "publishNotReadyAddresses"}, set()),
    "failurePolicy": ({"maxRestarts", "restartStrategy", "rules"}, set()),
    "job": ({"name", "groupName", "template", "replicas", "dependsOn"}, {"name", "template"}),
    "jobSpec": ({"parallelism", "completions", "completionMode", "backoffLimit", "template"}, {"template"}),
    "podSpec": ({"restartPolicy", "terminationGracePeriodSeconds", "nodeSelector", "tolerations", "containers",
                 "volumes"}, {"containers", "restartPolicy"}),
    "container": ({"name", "image", "command", "args", "env", "ports", "resources", "volumeMounts"}, {"name", "image"}),
}


FIELDS["sweepJob"] = (FIELDS["jobSpec"][0] | {"podFailurePolicy"}, {"template"})


def assert_fields(kind, found):
  allowed, required = FIELDS[kind]
  assert required <= set(found) <= allowed, kind


@pytest.fixture
def launch(platform):
  """Returns a function that runs kubernetes.sh."""
  def launch(*argv):
    platform.add("kubectl", reads=True)
    return platform.run("launch/kubernetes.sh", *argv)
  return launch


@pytest.fixture
def pod_of(launch, platform):
  """Returns a function from flags to (spec, job, pod, container) of the manifest, which it checks."""
  def pod_of(*flags):
    done = launch(*flags, "--dry_run", "train", "--workdir=gs://b/it's", "--a=$(HOME) & {{NAME}}: b")
    assert done.returncode == 0 and platform.calls == [], done.stderr
    manifest = yaml.safe_load(done.stdout)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["metadata"]["name"] == manifest["spec"]["network"]["subdomain"] == "a"
    spec = manifest["spec"]
    (job,) = spec["replicatedJobs"]
    job_spec = job["template"]["spec"]
    pod = job_spec["template"]["spec"]
    (container,) = pod["containers"]
    for kind, found in (("spec", spec), ("network", spec["network"]), ("failurePolicy", spec["failurePolicy"]),
                        ("job", job), ("jobSpec", job_spec), ("podSpec", pod), ("container", container)):
      assert_fields(kind, found)
    assert job_spec["parallelism"] == job_spec["completions"] and job_spec["completionMode"] == "Indexed"
    # Any pod that fails fails its job, and with it all of them start anew.
    assert job_spec["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert container["image"] == "registry/lmjax:1"
    # Kubernetes makes $$( a plain $(.
    assert container["args"] == ["train", "--workdir=gs://b/it's", "--a=$$(HOME) & {{NAME}}: b"]
    return spec, job, pod, container
  return pod_of


def test_one_job_a_slice_of_as_many_hosts_as_its_shape_has(pod_of):
  spec, job, pod, container = pod_of(*TPU)
  assert job["replicas"] == 2 and job["template"]["spec"]["completions"] == 8
  assert pod["nodeSelector"] == {"cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
                                 "cloud.google.com/gke-tpu-topology": "4x8"}
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  assert container["command"][-1] == "tpu" and container["env"] == [{"name": "LMJAX_DISTRIBUTED", "value": "auto"}]
  assert spec["failurePolicy"]["maxRestarts"] == 10


def test_the_pods_of_gpus_name_the_first_as_it_is_called(pod_of):
  spec, job, pod, container = pod_of(*GPU)
  assert job["replicas"] == 1 and job["template"]["spec"]["completions"] == 3
  assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
  assert container["resources"]["limits"] == {"nvidia.com/gpu": 8} and container["command"][-1] == "gpu"
  assert spec["failurePolicy"]["maxRestarts"] == 4
  values = {variable["name"]: variable.get("value") for variable in container["env"]}
  # JobSet names a pod JOBSET-JOB-INDEX-POD, within the subdomain.
  assert values == {"JAX_COORDINATOR_ADDRESS": f"a-{job['name']}-0-0.a:8482", "JAX_NUM_PROCESSES": "3",
                    "JAX_PROCESS_ID": None}


def sweep_of(launch, *flags):
  """Returns (job, pod, container) of the manifest of a sweep's workers."""
  done = launch(*flags, "--dry_run", "sweep", "--config=/lmjax/a.py", "--workdir=/shared/it's")
  assert done.returncode == 0, done.stderr
  manifest = yaml.safe_load(done.stdout)
  assert (manifest["apiVersion"], manifest["kind"], manifest["metadata"]) == ("batch/v1", "Job", {"name": "a"})
  job, pod = manifest["spec"], manifest["spec"]["template"]["spec"]
  (container,) = pod["containers"]
  for kind, found in (("sweepJob", job), ("podSpec", pod), ("container", container)):
    assert_fields(kind, found)
  return job, pod, container


def test_the_workers_of_a_sweep_share_a_folder_and_nothing_else(launch):
  job, pod, container = sweep_of(launch, *SWEEP)
  assert job["parallelism"] == job["completions"] == 8 and job["completionMode"] == "Indexed"
  assert job["backoffLimit"] == 10 and pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-l4"}
  # Kubernetes takes a policy on failures only where a pod that fails is not started again in its place.
  assert pod["restartPolicy"] == "Never" and job["podFailurePolicy"]["rules"] == [
      {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]
  assert container["command"] == ["bash", "/lmjax/launch/worker.sh", "gpu"]
  assert container["args"] == ["sweep", "--machines=8", "--config=/lmjax/a.py", "--workdir=/shared/it's"]
  assert container["resources"]["limits"] == {"nvidia.com/gpu": 1} and "env" not in container
  mounted = {volume["name"]: volume for volume in pod["volumes"]}
  assert {"mountPath": "/shared", "name": "shared"} in container["volumeMounts"]
  assert mounted["shared"]["persistentVolumeClaim"] == {"claimName": "claim"}


def test_the_folder_of_a_sweep_may_be_a_flag_and_a_word(launch):
  done = launch(*SWEEP, "--dry_run", "sweep", "--workdir", "/shared/a b")
  assert done.returncode == 0 and "'--workdir', '/shared/a b'" in done.stdout


def test_a_worker_of_a_sweep_may_have_a_tpu_of_one_host(launch):
  flags = ("--name=a", "--image=i", "--accelerator=tpu-v5-lite-podslice", "--topology=2x2", "--volume=claim")
  job, pod, container = sweep_of(launch, *flags)
  assert job["completions"] == 1 and container["resources"]["limits"] == {"google.com/tpu": 4}
  assert pod["nodeSelector"] == {"cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
                                 "cloud.google.com/gke-tpu-topology": "2x2"}
  assert container["command"][-1] == "tpu"


def test_what_a_dry_run_prints_is_what_is_applied(launch, platform):
  printed = launch(*TPU, "--dry_run", "train").stdout
  assert launch(*TPU, "train").returncode == 0
  assert platform.calls == [["kubectl", ["apply", "-f", "-"], {}, printed]]
  assert "{{" not in printed


@pytest.mark.parametrize("argv, says", [
    (TPU, "a command"), ((*TPU[:3], "train"), "--topology="), ((*TPU, "--name=A_b", "train"), "--name=A_b"),
    ((*GPU, "--hosts=x", "train"), "are numbers"), ((*GPU, "--gpus=8", "train"), "no flag --gpus=8"),
    ((*SWEEP, "train"), "are of a sweep"), ((*SWEEP[:-1], "sweep"), "needs --volume"),
    ((*SWEEP, "--hosts=2", "sweep"), "one host"), ((*SWEEP, "--workers=many", "sweep"), "are numbers"),
    ((*SWEEP, "sweep", "--config=/shared/a.py"), "--workdir of a sweep must be a folder in /shared"),
    ((*SWEEP, "sweep", "--workdir=runs/depth"), "must be a folder in /shared"),
    ((*SWEEP, "sweep", "--workdir=/sharedly/a"), "must be a folder in /shared"),
    ((*SWEEP, "sweep", "--workdir", "gs://b/shared/a"), "must be a folder in /shared")])
def test_what_cannot_work_is_refused(launch, platform, argv, says):
  done = launch(*argv)
  assert done.returncode == 2 and platform.calls == []
  assert done.stderr.startswith("lmjax: error: ") and says in done.stderr and done.stderr.count("\n") == 1
