"""What a recipe's main prints and exits with when a run ends early."""

import time

import pytest

from layerskip_recipes.cli.run import fail, run_cli


@pytest.mark.parametrize(
    "lost",
    [
        "Connection closed by peer [127.0.0.1]:10980",
        "Read error [127.0.0.1]:10980: Connection reset by peer",
        "writev [127.0.0.1]:10980: Broken pipe",
    ],
)
def test_a_rank_whose_peer_ended_says_so_after_a_while(lost, capsys, monkeypatch):
    """They are what gloo says where rank 0 ended by an error of its own, depending on what was under way. Then
    torchrun ends this rank in the while; where the network broke, or another machine's rank died, nobody says it else.
    """
    before, said = [], f"[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] {lost}. GLHF!"
    monkeypatch.setattr(time, "sleep", lambda seconds: before.append((seconds, capsys.readouterr().err)))

    def steps():
        raise RuntimeError(f"{said}\nmore of it")

    with pytest.raises(SystemExit) as ended:
        run_cli(steps)
    assert ended.value.code == 1
    assert before == [(2, "")]
    assert capsys.readouterr().err == f"RuntimeError: another process ended or cannot be reached: {said}\n"


def test_ctrl_c_while_it_loads_is_one_line(capsys):
    def steps():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_cli(steps)
    assert ended.value.code == 130 and capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(("rank", "waits"), [("0", []), ("1", [5])])
def test_a_mistake_is_said_by_the_first_process(rank, waits, capsys, monkeypatch):
    """The others leave it time, in which torchrun ends them; what only one of them finds is said after that."""
    waited = []
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(time, "sleep", waited.append)
    with pytest.raises(SystemExit) as ended:
        fail(ValueError("key: no\nvalue"))
    assert ended.value.code == 1 and waited == waits
    assert capsys.readouterr().err == "ValueError: key: no value\n"


def test_other_connections_keep_their_traceback():
    def steps():
        raise RuntimeError("wandb: Connection reset by peer")

    with pytest.raises(RuntimeError, match="wandb"):
        run_cli(steps)
