"""The sample command, end to end."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from commands import assert_success

LINE = "-" * 80


@pytest.fixture
def run(user, runs):
    return runs.give(user, "first", "callbacks=checkpoint")


def test_a_text_depends_neither_on_other_texts_nor_on_streaming(user, run):
    (user.folder / "prompts.txt").write_text("def f(x):\nline 7\\nline 8\nä\n")
    one = user.python("gptlab.sample", f"run={run}", "prompts=prompts.txt", "num_samples=2", "max_new_tokens=40")
    assert_success(one)
    texts = one.stdout.split(f"\n{LINE}\n")
    assert [text[: text.index("e")] for text in texts[:2]] == ["d"] * 2
    assert texts[2].startswith("line 7\nline 8")
    assert len(texts) == 7
    assert texts[0] != texts[1]
    assert "longer than block_size=32 tokens continues from its last 16 tokens" in one.stderr
    # generated alone and streamed, the first text is the same
    alone = ("prompt=def f(x):", "max_new_tokens=40", "stream=true")
    streamed = user.python("gptlab.sample", f"run={run}", *alone, "report=true")
    assert_success(streamed)
    assert streamed.stdout.startswith(texts[0] + "\n")
    assert re.search(r"decode    39 tokens in .* tokens/s, .*\nmemory    [\d.]+ GB/s measured", streamed.stdout)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('"two" and "three"', '"two" and "three"'),
        ("'s", "'s"),
        ('"', '"'),
        (r"a\nb", "a\nb"),
        (r"\\nabla \theta", r"\nabla \theta"),
        ("${x} [1,2] a=b", "${x} [1,2] a=b"),
        ("\x0ca\u2028b", "\x0ca\u2028b"),
    ],
)
def test_a_prompt_is_literal_except_for_line_breaks(user, run, prompt, text):
    rest = ("max_new_tokens=1", "temperature=0", r'stop=["\n\n","<|endoftext|>"]')
    done = user.python("gptlab.sample", f"run={run}", f"prompt={prompt}", *rest)
    assert_success(done)
    assert done.stdout.startswith(text)
    (user.folder / "prompts.txt").write_text(f"\ufeff{prompt}\nsecond\n", encoding="utf-8")
    done = user.python("gptlab.sample", f"run={run}", "prompts=prompts.txt", *rest)
    assert_success(done)
    assert done.stdout.startswith(text)
    assert done.stdout.count(LINE) == 2


@pytest.mark.slow
def test_two_line_breaks_are_a_stop_string(user, run):
    arguments = (f"run={run}", "prompt=line", "max_new_tokens=400", "temperature=1", "seed=3")
    whole = user.python("gptlab.sample", *arguments).stdout.split(f"\n{LINE}")[0]
    cut = user.python("gptlab.sample", *arguments, r'stop=["\n"]').stdout.split(f"\n{LINE}")[0]
    assert "\n" in whole
    assert cut == whole.partition("\n")[0]


@pytest.mark.slow
def test_a_text_ends_before_a_stop_string(user, run):
    arguments = (f"run={run}", "prompt=line", "max_new_tokens=20", "temperature=0", "precision=bfloat16", "int8=true")
    whole = user.python("gptlab.sample", *arguments)
    assert_success(whole)
    text = whole.stdout.split(f"\n{LINE}")[0]
    stop = next(character for character in text[8:] if character.isalnum() or character == " ")
    cut = user.python("gptlab.sample", *arguments, f"stop=['{stop}']")
    assert_success(cut)
    assert cut.stdout.split(f"\n{LINE}")[0] == "line" + text[4:].partition(stop)[0]


def test_an_interactive_session_continues_after_ctrl_c_and_ends_with_ctrl_d(user, run):
    terminal, child_end = pty.openpty()
    endless = ("max_new_tokens=1000000", "temperature=0")  # the model generates no end-of-text token
    command = (sys.executable, "-m", "gptlab.sample", f"run={run}", "interactive=true", *endless)
    process = subprocess.Popen(
        command,
        cwd=user.folder,
        env=user.environment,
        stdin=child_end,
        stdout=child_end,
        stderr=child_end,
        # the process that started the tests may ignore SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    shown = ""

    def until(condition) -> None:
        nonlocal shown
        end = time.monotonic() + 60
        while not condition(shown):
            assert time.monotonic() < end, shown
            if select.select([terminal], [], [], 1)[0]:
                shown += os.read(terminal, 4096).decode(errors="replace")

    try:
        until(lambda text: text.endswith("\r\n> "))
        for number in (1, 2):
            os.write(terminal, f"line {number}\n".encode())
            # the terminal echoes the prompt, then the command prints it again with the text that it generates
            until(lambda text, number=number: len(text.partition(f"line {number}")[2]) > 50)
            process.send_signal(signal.SIGINT)
            until(lambda text: text.endswith("\r\n> "))
        os.write(terminal, b"\x04")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        os.close(terminal)
        os.close(child_end)


CONFIG_ERRORS = {
    "two sources": (["prompts=a", "prompt=b"], "prompts cannot be combined with prompt"),
    "two streams": (["stream=true", "num_samples=2"], "stream=true prints one text at a time"),
    "interactive": (["interactive=true", "prompt=a"], "interactive=true reads prompts from the terminal"),
    "no file": (["prompts=none.txt"], "prompts=none.txt cannot be read: no such file or directory."),
    "top_p": (
        ["top_p=1.5"],
        "top_p=1.5 is not valid: it should be a number greater than 0 and less than or equal to 1",
    ),
    "precision": (["precision=int8"], "precision='int8' is not valid: it should be 'float32' or 'bfloat16'"),
    "stop": (["stop=['']"], "is not valid"),
}


def test_errors_are_found_before_torch_is_imported(user, run):
    package = user.folder / "elsewhere" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('torch was imported')")
    user.environment["PYTHONPATH"] = f"{package.parent}:{user.environment.get('PYTHONPATH', '')}"
    for arguments, message in CONFIG_ERRORS.values():
        done = user.python("gptlab.sample", f"run={run}", *arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
