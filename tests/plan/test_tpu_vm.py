"""Pastes the steps of plan/README.md for TPU VMs into one bash.

There are stand-ins for gcloud, for ssh (which waits for its channel), for the hosts and for a share that root owns.
"""

import os
import re
import shutil
import subprocess
import time

import pytest

from helpers.documents import blocks, ROOT

DOCUMENT = "jaxrl_reason/plan/README.md"
HOSTS = ("host0", "host1")
TRAINING_SECONDS = 4

# `queued-resources ssh` runs the command once per host, in the home of the host. Its output goes through a pipe. Like
# ssh, it ends when no process holds the pipe any more, even if the command has ended before.
GCLOUD = r"""#!/bin/bash
echo "$*" >> "$ROOT_DIR/calls"
hosts="host0 host1"; command= code=0; local=(); started=()
for word in "$@"; do
  case "$word" in
    --worker=0) hosts=host0;;
    --command=*) command="${word#--command=}";;
    --*) ;;
    *) local+=("$word");;
  esac
done
case "$*" in
  *"queued-resources ssh"*)
    for host in $hosts; do
      ( cd "$ROOT_DIR/$host" && HOST=$host HOME="$ROOT_DIR/$host" PATH="$ROOT_DIR/remote:$PATH" bash -c "$command" 2>&1 | cat
        exit ${PIPESTATUS[0]} ) &
      started+=($!)
    done
    for pid in "${started[@]}"; do wait $pid || code=1; done
    exit $code;;
  *"queued-resources scp"*)
    from="${local[4]}"; to="${local[5]}"
    case "$to" in
      *:) for host in $hosts; do cp "$from" "$ROOT_DIR/$host/"; done;;
      *) cp "$ROOT_DIR/host0/${from#*:}" "$to";;
    esac;;
  *"queued-resources describe"*)
    n=$(cat "$ROOT_DIR/described" 2>/dev/null || echo 0); echo $((n + 1)) > "$ROOT_DIR/described"
    states=(WAITING_FOR_RESOURCES PROVISIONING ACTIVE); echo "${states[n]}";;
  *"filestore instances describe"*) [ ! -f "$ROOT_DIR/no_share" ] && echo 10.0.0.2;;
esac
"""
LOCAL = {
    "gcloud": GCLOUD,
    "ssh-agent": "#!/bin/bash\necho 'SSH_AUTH_SOCK=/tmp/agent; export SSH_AUTH_SOCK;'\n",
    "ssh-add": '#!/bin/bash\n[ -n "$SSH_AUTH_SOCK" ] && [ -f "$1" ]\n',
    "sleep": "#!/bin/bash\n[ $1 = 30 ] || exec /bin/sleep $1\n",  # the wait for the machine
}
# Packages are found only after `apt-get update`, and mount needs nfs-common. Only root can write to a new share. pgrep
# and pkill see the processes of their host only.
MINE = r"""
found=$(for pid in $(/usr/bin/pgrep -f -- "${@: -1}"); do
  [ $pid = $$ ] || { tr '\0' '\n' < /proc/$pid/environ 2>/dev/null | grep -qx "HOST=$HOST" && echo $pid; }
done)
[ -n "$found" ] || exit 1
"""
REMOTE = {
    "sudo": '#!/bin/bash\nSUDO=1 exec "$@"\n',
    "apt-get": '#!/bin/bash\n[ -n "$SUDO" ] || exit 1\ncase "$*" in\n  update) touch "$HOME/updated";;\n  *nfs-common*) [ -f "$HOME/updated" ] && touch "$HOME/nfs" || exit 100;;\nesac\n',
    "mount": '#!/bin/bash\n[ -n "$SUDO" ] && [ -f "$HOME/nfs" ] && [ "$1" = 10.0.0.2:/share ] && [ -f "$HOME/folder" ] && touch "$HOME/mounted"\n',
    "mkdir": '#!/bin/bash\n[ -z "$SUDO" ] || touch "$HOME/folder"\nexec /bin/mkdir "$@"\n',
    "mountpoint": '#!/bin/bash\n[ -f "$HOME/mounted" ]\n',
    "touch": '#!/bin/bash\ncase "$1" in\n  */mnt/shared/*) "$ROOT_DIR/remote/may_write" || exit 1;;\nesac\nexec /usr/bin/touch "$@"\n',
    "may_write": '#!/bin/bash\n[ -f "$HOME/mounted" ] && [[ $(stat -c %A "$ROOT_DIR/mnt/shared") == *w? ]] || { echo "Permission denied"; exit 1; }\n',
    "hostname": "#!/bin/bash\necho $HOST\n",
    "curl": r"""#!/bin/bash
echo 'mkdir -p ~/.local/bin && cp "$ROOT_DIR/remote/uv_to_install" ~/.local/bin/uv'
""",
    "uv_to_install": r"""#!/bin/bash
case "$1" in
  venv) mkdir "${@: -1}" "${@: -1}/bin" && cp "$ROOT_DIR/remote/venv_python" "${@: -1}/bin/python";;
  pip) [ -f jaxrl_reason/setup.cfg ] && /usr/bin/touch "$HOME/installed";;
esac
""",
    "venv_python": r"""#!/bin/bash
[ -f "$HOME/installed" ] || exit 1
[ "$1" = -c ] && { echo "$HOST sees the chips"; exit; }
"$ROOT_DIR/remote/may_write" || exit 1
[ "$HF_HOME" = "$ROOT_DIR/mnt/shared/hf" ] && [ "$PWD" = "$HOME/jaxrl_reason" ] || exit 1
for word in "$@"; do case "$word" in --workdir=*) workdir="${word#--workdir=}";; esac; done
trap 'echo saved; exit 143' TERM
mkdir -p "$workdir/checkpoints" "$workdir/start"; echo '{}' > "$workdir/metrics.jsonl"; echo w > "$workdir/checkpoints/1"
echo "$HOST step 1"; for i in $(seq $SECONDS_OF_TRAINING); do /bin/sleep 1 & wait $!; done; echo "$HOST finished"
""",
    "pgrep": f'#!/bin/bash\n{MINE}\ncase "$*" in *-o*) echo "$found" | head -n 1;; *) echo "$found";; esac\n',
    "pkill": f"#!/bin/bash\n{MINE}\nkill -TERM $found\n",
}


def steps():
    """Returns (step, text) of the bash blocks of the steps 2 to 9."""
    lines = (ROOT / DOCUMENT).read_text().splitlines()
    number = lambda block: max(int(m[1]) for line in lines[: block.line] if (m := re.match(r"## (\d+)\.", line)))
    last = next(i for i, line in enumerate(lines) if line.startswith("## If a machine is taken away"))
    return [(number(b), b.text) for b in blocks(DOCUMENT) if b.line < last and b.needs != "nothing" and number(b) > 1]


@pytest.fixture
def cloud(tmp_path):
    """Writes the stand-ins. Returns a function that pastes blocks into a new bash and returns its results."""
    for folder, programs in (("local", LOCAL), ("remote", REMOTE)):
        (tmp_path / folder).mkdir()
        for name, text in programs.items():
            (tmp_path / folder / name).write_text(text)
            (tmp_path / folder / name).chmod(0o755)
    for folder in (*HOSTS, "home", "home/.ssh", "mnt", "mnt/shared", "clone"):
        (tmp_path / folder).mkdir()
    (tmp_path / "mnt" / "shared").chmod(0o755)
    shutil.copy(ROOT / "setup.cfg", tmp_path / "clone")

    def paste(texts, seconds=TRAINING_SECONDS):
        script = "".join(
            f'{text}\necho "== $? $EPOCHREALTIME"\n'.replace("/mnt/shared", f"{tmp_path}/mnt/shared").replace(
                "/tmp/jaxrl", f"{tmp_path}/jaxrl"
            )
            for text in texts
        )
        path = f"{tmp_path / 'local'}:{os.environ['PATH']}"
        own = {"ROOT_DIR": str(tmp_path), "HOME": str(tmp_path / "home"), "PATH": path, "HF_TOKEN": "hf_1"}
        begin = time.time()
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=tmp_path / "clone",
            env=os.environ | own | {"SECONDS_OF_TRAINING": str(seconds)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        out, results = done.stdout, []
        for text, code, end in re.findall(r"(.*?)== (\d+) ([\d.]+)\n", out, re.DOTALL):
            results.append((text, int(code), float(end) - begin))
            begin = float(end)
        assert len(results) == len(texts), done.stdout + done.stderr
        return results, done.stderr

    paste.root = tmp_path
    return paste


def block(number, i=0):
    return [text for step, text in steps() if step == number][i]


def test_every_step_has_a_block():
    assert sorted({number for number, _ in steps()}) == list(range(2, 10))


@pytest.mark.processes
def test_the_steps_pasted_in_order(cloud):
    """A run is started, followed to its end, and fetched. ssh returns at once from the start of the run."""
    texts = [text for _, text in steps() if "pkill" not in text]
    results, errors = cloud(texts)
    assert [code for _, code, _ in results] == [0] * len(texts), (results, errors)
    at = {text: i for i, text in enumerate(texts)}
    out = lambda number, i=0: results[at[block(number, i)]]
    assert out(3)[0].split() == ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    assert sorted(out(4)[0].splitlines()) == [f"{host} sees the chips" for host in HOSTS]
    assert "Permission denied" not in out(5)[0]
    assert (cloud.root / "mnt/shared/hf/token").read_text() == "hf_1"
    assert (cloud.root / "mnt/shared/hf/token").stat().st_mode & 0o777 == 0o600
    assert out(6)[2] < TRAINING_SECONDS - 2  # ssh does not wait for the run
    state, _, seconds = out(7)
    assert all(f"{host} trains" in state for host in HOSTS)
    assert state.splitlines()[-2:] == ["host0 step 1", "host0 finished"] and seconds > 1  # the log until its end
    assert (cloud.root / "clone/grpo/metrics.jsonl").is_file() and not (cloud.root / "clone/grpo/checkpoints").exists()
    calls = (cloud.root / "calls").read_text()
    assert "queued-resources delete mine --zone=us-west4-a --force" in calls
    assert "filestore instances delete mine" in calls and "services enable tpu.googleapis.com" in calls


@pytest.mark.processes
def test_a_run_is_stopped_and_its_state_is_shown(cloud):
    setup = [text for number, text in steps() if number < 6]
    setup += [text for number, text in steps() if number in (4, 5)]  # again, as after a preemption
    end_the_other = """on_all 'pkill -TERM -f "[j]axrl_reason.train"'"""  # on TPUs, the end of one host ends the others
    results, _ = cloud([*setup, block(6), block(7, 1), "sleep 1", block(7).splitlines()[0], end_the_other], seconds=20)
    assert [code for _, code, _ in results[:-2]] == [0] * (len(results) - 2), results
    state = results[-2][0]
    assert "host0 has ended" in state and "saved" in state and "host1 trains" in state


@pytest.mark.processes
def test_a_share_without_an_address_and_a_token_that_is_not_set_end_the_steps(cloud):
    setup = [text for number, text in steps() if number < 5]
    with pytest.raises(AssertionError, match="HF_TOKEN: set it to your token of the hub"):
        cloud([*setup, block(5), "unset HF_TOKEN", block(5, 1)])
    assert (cloud.root / "host0" / "mounted").exists() and not (cloud.root / "mnt/shared/hf").exists()
    for host in HOSTS:
        (cloud.root / host / "mounted").unlink()
    (cloud.root / "no_share").touch()
    with pytest.raises(AssertionError, match="address: gcloud has named no address of the share"):
        cloud([block(2), block(5)])
    assert not (cloud.root / "host0" / "mounted").exists()


@pytest.mark.processes
def test_the_stand_ins_notice_the_faults_of_an_earlier_text(cloud):
    """ssh waits if the whole list is in the background. A share without chmod and apt-get without update fail."""
    setup = [text for number, text in steps() if number < 6]
    list_in_the_background = block(6).replace(" || exit 1; export", " && export").replace("; nohup", " && nohup")
    results, _ = cloud([*setup, list_in_the_background], seconds=3)
    assert results[-1][2] > 2.5
    (cloud.root / "mnt" / "shared").chmod(0o755)
    for name in ("updated", "nfs", "mounted"):
        for host in HOSTS:
            (cloud.root / host / name).unlink()
    without_chmod = "".join(line for line in block(5).splitlines(keepends=True) if "chmod" not in line)
    results, _ = cloud([block(2), without_chmod])
    assert results[-1][0].count("Permission denied") == 2
    for host in HOSTS:
        (cloud.root / host / "updated").unlink()
    results, _ = cloud([block(2), "on_all 'sudo apt-get install -y nfs-common || echo no such package'"])
    assert results[-1][0].count("no such package") == 2
