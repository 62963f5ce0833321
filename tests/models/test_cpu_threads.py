"""How many threads a model on the CPU gets: control groups in faked files, affinity, busy cores, and users' choices."""

import os
import subprocess
import sys

import pytest
import torch

from caa_lens.models import cpu_threads
from caa_lens.models.cpu_threads import (
    CpuThreadsWarning,
    choose_threads,
    free_cores,
    sleep_while_waiting,
    usable_cores,
)

V1 = "31 23 0:28 / {at}/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
V2 = "41 31 0:38 / {at} rw,relatime - cgroup2 cgroup2 rw\n"
AT = "/sys/fs/cgroup"


def files(root, **texts):
    """Files of a faked system, by their paths with `__` for a slash."""
    for name, text in texts.items():
        file = root / name.replace("__", "/").replace("-", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def system(root, *, cgroup, mounts, limits):
    """A faked system whose folders of control groups hold these limits."""
    files(root, proc__self__cgroup=cgroup, proc__self__mountinfo="22 1 0:5 / / rw - ext4 /dev/vda rw\n" + mounts)
    for path, text in limits.items():
        (root / path.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
        (root / path.lstrip("/")).write_text(text)
    return root


@pytest.fixture
def cores(monkeypatch):
    """Let this process run on so many cores of a larger machine."""

    def give(n, of=64):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(n)), raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: of)
        monkeypatch.setattr(os, "process_cpu_count", lambda: n, raising=False)

    give(64)
    return give


def test_without_files_the_cores_are_those_it_may_run_on(cores, tmp_path):
    assert usable_cores(tmp_path) == 64
    cores(3)
    assert usable_cores(tmp_path) == 3


@pytest.mark.parametrize(
    ("said", "n"), [("150000 100000", 1.5), ("max 100000", 64), ("", 64), ("nonsense", 64), ("50000 0", 64)]
)
def test_a_quota_of_version_2_is_heeded(cores, tmp_path, said, n):
    root = system(tmp_path, cgroup="0::/\n", mounts=V2.format(at=AT), limits={f"{AT}/cpu.max": said, f"{AT}/x": ""})
    assert usable_cores(root) == n


@pytest.mark.parametrize(("quota", "n"), [("150000", 1.5), ("-1", 64), ("25000", 0.25)])
def test_a_quota_of_version_1_is_heeded(cores, tmp_path, quota, n):
    limits = {f"{AT}/cpu/cpu.cfs_quota_us": quota, f"{AT}/cpu/cpu.cfs_period_us": "100000\n"}
    root = system(tmp_path, cgroup="1:cpu,cpuacct:/\n0::/\n", mounts=V1.format(at=AT), limits=limits)
    assert usable_cores(root) == n


def test_of_nested_groups_the_tightest_counts_and_that_of_others_does_not(cores, tmp_path):
    limits = {
        f"{AT}/pod/cpu.max": "200000 100000",
        f"{AT}/pod/job/cpu.max": "max 100000",
        f"{AT}/pod/job/task/cpu.max": "400000 100000",
        f"{AT}/other/cpu.max": "10000 100000",
    }
    root = system(tmp_path, cgroup="0::/pod/job/task\n", mounts=V2.format(at=AT), limits=limits)
    assert usable_cores(root) == 2


def test_in_a_container_of_version_1_the_path_from_outside_is_the_mount_itself(cores, tmp_path):
    mounts = "31 23 0:28 /docker/abc /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    limits = {f"{AT}/cpu/cpu.cfs_quota_us": "300000", f"{AT}/cpu/cpu.cfs_period_us": "100000"}
    root = system(tmp_path, cgroup="3:cpu:/docker/abc\n", mounts=mounts, limits=limits)
    assert usable_cores(root) == 3


def test_a_group_that_cannot_be_seen_from_inside_counts_as_the_mount(cores, tmp_path):
    root = system(
        tmp_path,
        cgroup="0::/../../other\n",
        mounts=V2.format(at=AT),
        limits={f"{AT}/cpu.max": "150000 100000"},
    )
    assert usable_cores(root) == 1.5


def test_both_versions_at_once_are_heeded(cores, tmp_path):
    limits = {f"{AT}/cpu/cpu.cfs_quota_us": "500000", f"{AT}/cpu/cpu.cfs_period_us": "100000"}
    mounts = V1.format(at=AT) + V2.format(at=f"{AT}/unified")
    root = system(tmp_path, cgroup="1:cpu:/\n0::/\n", mounts=mounts, limits=limits | {f"{AT}/unified/x": ""})
    assert usable_cores(root) == 5


def stat(root, *lines):
    return files(root, proc__stat="cpu 1 2 3\n" + "".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize(
    ("after", "free"),
    [
        ("cpu0 120 0 0 0 0 0 0 0|cpu1 120 0 0 0 0 0 0 0", 0.0),  # both busy
        ("cpu0 100 0 0 20 0 0 0 0|cpu1 120 0 0 0 0 0 0 0", 1.0),
        ("cpu0 100 0 0 10 10 0 0 0|cpu1 100 0 0 20 0 0 0 0", 2.0),  # waiting for a disk is free
        ("cpu0 100 20 0 0 0 0 0 0|cpu1 100 0 0 0 0 0 0 20", 1.0),  # less priority, and taken by the host
    ],
)
def test_free_cores_are_read_off_the_ticks_between_two_looks(cores, tmp_path, monkeypatch, after, free):
    cores(2)
    monkeypatch.setattr(os, "nice", lambda n: 0)
    monkeypatch.setattr(cpu_threads.time, "process_time", lambda: 0.0)
    before = "100 0 0 0 0 0 0 0"
    stat(tmp_path, f"cpu0 {before}", f"cpu1 {before}", f"cpu2 {before}")
    monkeypatch.setattr(
        cpu_threads.time, "sleep", lambda s: stat(tmp_path, *after.split("|"), "cpu2 999 0 0 0 0 0 0 0")
    )
    assert free_cores(tmp_path) == pytest.approx(free)


def test_what_this_process_uses_is_free_for_it(cores, tmp_path, monkeypatch):
    cores(2)
    times = iter([1.0, 1.1])
    monkeypatch.setattr(cpu_threads.time, "process_time", lambda: next(times))
    stat(tmp_path, "cpu0 0 0 0 0 0 0 0 0", "cpu1 0 0 0 0 0 0 0 0")
    monkeypatch.setattr(
        cpu_threads.time, "sleep", lambda s: stat(tmp_path, "cpu0 10 0 0 10 0 0 0 0", "cpu1 20 0 0 0 0 0 0 0")
    )
    assert free_cores(tmp_path) == pytest.approx(0.5 + 0.5)


def test_without_ticks_nothing_is_said_of_busy_cores(cores, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_threads.time, "sleep", lambda s: None)
    assert free_cores(tmp_path) is None
    stat(tmp_path, "cpu0 1 2 3 4 5 6 7 8")  # 63 are missing
    assert free_cores(tmp_path) is None


@pytest.fixture
def process(monkeypatch, cores):
    """A process in which nobody has chosen anything: 64 threads by torch, all free; returns what was set."""
    for name in (*cpu_threads.NUMBER, *cpu_threads.WAITING):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"own": None, "ours": None, "sleeping": False, "told": None}.items():
        monkeypatch.setattr(cpu_threads._Chosen, name, value)
    threads = [64]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(cpu_threads, "usable_cores", lambda: 64.0)
    monkeypatch.setattr(cpu_threads, "free_cores", lambda: 64.0)
    return threads


def test_where_all_cores_are_free_nothing_changes_and_nothing_is_said(process):
    assert choose_threads() == 64
    assert process == [64]


def test_a_quota_of_one_and_a_half_of_64_cores_gives_one_thread_and_says_so_once(process, monkeypatch):
    monkeypatch.setattr(cpu_threads, "usable_cores", lambda: 1.5)
    with pytest.warns(CpuThreadsWarning, match=r"1 CPU thread where torch would take 64.*may use 1\.5 cores"):
        assert choose_threads() == 1
    assert choose_threads() == 1  # warnings are errors here
    assert process == [64, 1]


def test_beside_busy_neighbours_it_takes_the_free_cores_and_all_when_they_are_free_again(process, monkeypatch):
    monkeypatch.setattr(cpu_threads, "free_cores", lambda: 12.3)
    with pytest.warns(CpuThreadsWarning, match=r"12\.3 of 64 cores free.*OMP_WAIT_POLICY=passive"):
        assert choose_threads() == 12
    monkeypatch.setattr(cpu_threads, "free_cores", lambda: 63.9)
    assert choose_threads() == 64
    assert process == [64, 12, 64]


def test_one_thread_is_left_where_nothing_is_free(process, monkeypatch):
    monkeypatch.setattr(cpu_threads, "free_cores", lambda: 0.1)
    with pytest.warns(CpuThreadsWarning):
        assert choose_threads() == 1


@pytest.mark.parametrize("name", cpu_threads.NUMBER)
def test_a_number_in_the_environment_is_the_users_choice(process, monkeypatch, name):
    monkeypatch.setenv(name, "64")
    monkeypatch.setattr(cpu_threads, "usable_cores", lambda: 2.0)
    assert choose_threads() == 64


def test_a_number_that_is_not_torchs_own_is_the_users_choice(process, monkeypatch):
    process.append(40)
    monkeypatch.setattr(cpu_threads, "usable_cores", lambda: 2.0)
    assert choose_threads() == 40
    process.append(64)
    with pytest.warns(CpuThreadsWarning):
        assert choose_threads() == 2
    process.append(3)  # after ours
    assert choose_threads() == 3


def test_threads_that_sleep_need_not_look_at_busy_cores(process, monkeypatch):
    monkeypatch.setattr(cpu_threads, "free_cores", lambda: pytest.fail("it looked"))
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert choose_threads() == 64


def test_one_thread_of_each_two_is_torchs_own_too(cores, tmp_path):
    cores(4, of=4)
    for core, pair in enumerate(("0-1", "0-1", "2-3", "2-3")):
        files(tmp_path, **{f"sys__devices__system__cpu__cpu{core}__topology__thread_siblings_list": pair})
    assert cpu_threads._torchs_own(tmp_path) == {4, 2}


def test_a_program_lets_threads_sleep_only_before_torch_is_there_and_unless_told_otherwise(process, monkeypatch):
    sleep_while_waiting()
    assert "OMP_WAIT_POLICY" not in os.environ  # torch is there
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "torch")
        patch.setenv("GOMP_SPINCOUNT", "5")
        sleep_while_waiting()
        assert "OMP_WAIT_POLICY" not in os.environ
        patch.delenv("GOMP_SPINCOUNT")
        sleep_while_waiting()
        assert os.environ["OMP_WAIT_POLICY"] == "passive"
        del os.environ["OMP_WAIT_POLICY"]
    with pytest.warns(CpuThreadsWarning, match="64 CPU threads; they sleep as they wait"):
        choose_threads()
    choose_threads()


def test_the_command_line_comes_before_torch():
    """What `sleep_while_waiting` needs: else it would do nothing, in silence."""
    code = (
        "import sys, os, caa_lens.cli.commands as c; assert 'torch' not in sys.modules\n"
        "sys.argv = ['caa-lens', '--version']\n"
        "try: c.main()\n"
        "except SystemExit: pass\n"
        "print(os.environ['OMP_WAIT_POLICY'])"
    )
    environment = {name: value for name, value in os.environ.items() if name not in cpu_threads.WAITING}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "passive"


def test_importing_the_package_changes_nothing():
    code = "import os, torch; n = torch.get_num_threads(); import caa_lens, caa_lens.models.cpu_threads\n"
    code += "assert torch.get_num_threads() == n and 'OMP_WAIT_POLICY' not in os.environ"
    environment = {name: value for name, value in os.environ.items() if name not in cpu_threads.WAITING}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.one_kind
def test_a_model_loaded_onto_the_cpu_chooses(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("caa_lens.models.loading.load.choose_threads", lambda: asked.append(1))
    from caa_lens import load_model

    with pytest.raises(FileNotFoundError):
        load_model("no such model", device="cpu")
    assert asked == [1]
