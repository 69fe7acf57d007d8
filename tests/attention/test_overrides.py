"""`fullattn.backend` holds in the thread or task that enters it, and is always undone."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest
import torch

import fullattn
from fullattn import _versions
from fullattn.attention import dispatch

NAMES = ("reference", "sdpa", "chunked", None)


def current() -> str | None:
    named = dispatch.forced(None)
    return named and named.name


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> object:
    yield
    assert current() is None
    assert dispatch._overrides.name is None
    assert dispatch._overrides.entered == []


def test_threads_have_overrides_of_their_own() -> None:
    layer, x = fullattn.FullyAttentional(8, project=False), torch.randn(1, 8, 5, 6)
    wrong: list[str | None] = []
    start = threading.Barrier(len(NAMES))

    def run(name: str | None) -> None:
        start.wait()
        for _ in range(100):
            with fullattn.backend(name):
                layer(x)
                wrong.extend([name] if current() != name else [])
                with contextlib.suppress(KeyError), fullattn.backend("chunked"):
                    wrong.extend([name] if current() != "chunked" else [])
                    raise KeyError
                wrong.extend([name] if current() != name else [])
            wrong.extend([name] if current() is not None else [])

    threads = [threading.Thread(target=run, args=(name,)) for name in NAMES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_tasks_have_overrides_of_their_own() -> None:
    async def run(name: str | None, steps: int) -> None:
        for step in range(steps):
            with fullattn.backend(name):
                await asyncio.sleep(0.001 * (step % 3))  # so that tasks leave in another order
                assert current() == name
            await asyncio.sleep(0)
            assert current() is None

    async def together() -> None:
        await asyncio.gather(*(run(name, 5 + i) for i, name in enumerate(NAMES)))

    asyncio.run(together())


def test_a_new_thread_does_not_inherit_an_override() -> None:
    seen: list[str | None] = []
    with fullattn.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(current()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_compiled_code_follows_the_override_of_its_thread() -> None:
    torch._dynamo.reset()
    layer, x = fullattn.FullyAttentional(8, project=False), torch.randn(1, 8, 5, 6)
    ran: list[str] = []

    def noting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        code = graph.print_readable(print_output=False)
        kind = "reference" if "softmax" in code else "fused"
        return lambda *arguments: ran.append(kind) or graph.forward(*arguments)

    compiled = torch.compile(layer, backend=noting)
    compiled(x)
    with fullattn.backend("reference"):
        compiled(x)
        thread = threading.Thread(target=compiled, args=(x,))
        thread.start()
        thread.join()
        compiled(x)
    compiled(x)
    # Dynamo before 2.6 does not see attributes of a thread-local object: one for all threads.
    in_thread = "fused" if _versions.local is threading.local else "reference"
    assert ran == ["fused", "reference", in_thread, "reference", "fused"]
    torch._dynamo.reset()
