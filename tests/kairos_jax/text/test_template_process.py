"""What a chat template can cost is bounded, whatever it does."""

import gc
import os
import signal
import subprocess
import sys
import threading

import pytest

from kairos_jax.text import template_process
from kairos_jax.text.template_process import TemplateRenderer

HI = [{"role": "user", "content": "hi"}]
SHOWN = "{{ messages[0].content }}"


@pytest.fixture
def started(monkeypatch) -> list[subprocess.Popen]:
    """The processes that a test starts."""
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(template_process.subprocess, "Popen", Popen)
    return started


def render(renderer: TemplateRenderer, source: str = SHOWN, messages=HI) -> str:
    return renderer.render("the template", source, messages, {})


@pytest.fixture(scope="module")
def small() -> TemplateRenderer:
    return TemplateRenderer(seconds=0.5, memory=256 << 20)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 7 ** (10 ** 9) }}",  # one operation, which no Python code can stop
        "{% macro m(n) %}{% if n %}{{ m(n - 1) ~ m(n - 1) }}{% endif %}{% endmacro %}{{ m(50) }}",
    ],
)
def test_a_template_without_end_is_ended(small, source):
    with pytest.raises(ValueError, match=r"^the template took more than 0\.5 s of processor time$"):
        render(small, source)
    assert render(small) == "hi"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 10 ** 10 }}",
        "{{ [1] * 10 ** 9 }}",
        "{{ 'x'.ljust(10 ** 11) }}",
        "{{ '%99999999999d' % 1 }}",
        "{{ (1).to_bytes(10 ** 10, 'big') }}",
        "{% set n = namespace(x='x' * 1000) %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}"
        "{% endfor %}",
    ],
)
def test_a_template_gets_no_more_memory_than_its_limit(small, source):
    with pytest.raises(ValueError, match=r"^the template took more than 256 MiB of memory$"):
        render(small, source)
    assert render(small) == "hi"


def test_long_conversations_are_within_the_bounds():
    renderer = TemplateRenderer()
    content = "é🙂 x" * 100_000
    messages = [{"role": "user", "content": content}] * 10  # 8 MB
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
    assert render(renderer, source, messages) == ("<user>" + content) * 10


def test_a_process_is_kept_and_a_second_starts_when_needed(started):
    renderer = TemplateRenderer()
    for _ in range(5):
        assert render(renderer) == "hi"
    assert len(started) == 1
    texts = []
    slow = "{% for i in range(9999) %}{% endfor %}" * 20 + SHOWN
    threads = [
        threading.Thread(target=lambda: texts.append(render(renderer, slow))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == ["hi"] * 8
    assert len(started) <= 2


def test_a_process_that_was_killed_is_replaced(started):
    renderer = TemplateRenderer()
    render(renderer)
    os.kill(started[0].pid, signal.SIGKILL)
    started[0].wait()
    assert render(renderer) == "hi"
    assert len(started) == 2


def test_a_process_that_dies_at_work_is_reported(started, monkeypatch):
    renderer = TemplateRenderer()
    render(renderer)
    (process,) = started
    process.kill()
    process.wait()
    with monkeypatch.context() as patch:
        patch.setattr(process, "poll", lambda: None)  # as if it died after that
        with pytest.raises(ValueError, match=r"^the template ended its process: Killed$"):
            render(renderer)
    assert render(renderer) == "hi"


def test_a_question_that_is_broken_off_leaves_no_answer_for_the_next(started, monkeypatch):
    renderer = TemplateRenderer()
    render(renderer)

    class Interrupted:
        def read(self, size):
            raise KeyboardInterrupt

        def close(self):
            pass

    pipe, started[0].stdout = started[0].stdout, Interrupted()
    with pytest.raises(KeyboardInterrupt):
        render(renderer, "first")
    pipe.close()
    assert render(renderer, "second") == "second"
    assert len(started) == 2


def test_a_process_that_cannot_start_is_an_error_of_the_servers(monkeypatch):
    monkeypatch.setattr(template_process.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="that renders chat templates ended with code 1"):
        render(TemplateRenderer())
    monkeypatch.setattr(template_process.sys, "executable", "/absent")
    with pytest.raises(FileNotFoundError):
        render(TemplateRenderer())


def test_processes_end_with_their_renderer(started):
    renderer = TemplateRenderer()
    render(renderer)
    del renderer
    gc.collect()
    assert started[0].returncode is not None


def test_processes_end_with_a_server_that_is_killed():
    """`run` waits for the end of all that hold its pipe: of the renderer's process, too."""
    program = (
        "import os, signal; from kairos_jax.text.template_process import TemplateRenderer; "
        "print(TemplateRenderer().render('', 'hi', [], {})); os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-u", "-c", program]
    ended = subprocess.run(command, capture_output=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGKILL, b"hi\n", b"")
