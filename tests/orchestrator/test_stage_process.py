"""The process of a stage as the system sees it: parents, descriptors, sockets, modules."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from sgl_diffusion.orchestrator.coordinator import Coordinator
from tests.orchestrator.play import alive, children, play

ROOT = Path(__file__).parents[2]


def run(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_no_worker_outlives_a_killed_server() -> None:
    server = run("""
        import asyncio
        from tests.orchestrator.play import children, small_app
        from sgl_diffusion.orchestrator.coordinator import Coordinator

        async def main():
            coordinator = Coordinator(small_app())
            await coordinator.start()
            await coordinator.ready()
            # One long step: the worker does not look at its channel meanwhile.
            job = await coordinator.submit({"steps": 2, "sleep": 0.01})
            await job.result()
            await coordinator.submit({"sleep": 60})
            await asyncio.sleep(0.2)
            print(*children(), flush=True)
            await asyncio.sleep(60)

        asyncio.run(main())
    """)
    with server:
        (worker,) = map(int, server.stdout.readline().split())
        assert alive(worker)
        server.kill()
    deadline = time.monotonic() + 60
    while alive(worker):
        assert time.monotonic() < deadline, "the worker lives on"
        time.sleep(0.01)


def test_a_server_that_forgets_to_stop_leaves_no_worker() -> None:
    server = run("""
        import asyncio
        from tests.orchestrator.play import children, small_app
        from sgl_diffusion.orchestrator.coordinator import Coordinator

        async def main():
            coordinator = Coordinator(small_app())
            await coordinator.start()
            await coordinator.ready()
            print(*children(), flush=True)

        asyncio.run(main())
        while children():
            pass
        print("none", flush=True)
    """)
    with server:
        (worker,) = map(int, server.stdout.readline().split())
        assert server.stdout.readline() == "none\n"
        assert not alive(worker)


def test_the_server_side_imports_no_torch() -> None:
    code = """
        import sys
        import sgl_diffusion.client.client, sgl_diffusion.client.generator
        import sgl_diffusion.orchestrator.coordinator, sgl_diffusion.orchestrator.jobstore
        import sgl_diffusion.orchestrator.stage_process
        print([name for name in ("torch", "diffusers", "transformers") if name in sys.modules])
    """
    with run(code) as process:
        assert process.stdout.read() == "[]\n"


def test_the_worker_is_alone_in_its_session_and_holds_one_socket() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        (worker,) = children()
        assert os.getsid(worker) == os.getpgid(worker) == worker
        links = [os.readlink(fd) for fd in Path(f"/proc/{worker}/fd").iterdir()]
        assert sum(link.startswith("socket:") for link in links) == 1
        # What the worker starts inherits descriptor 0, so that must not be the channel.
        assert os.readlink(f"/proc/{worker}/fd/0") == os.devnull
        limits = Path(f"/proc/{worker}/limits").read_text()
        core = next(line for line in limits.splitlines() if "core file" in line)
        assert core.split()[4:6] == ["0", "0"]
        command = Path(f"/proc/{worker}/cmdline").read_bytes().split(b"\0")[1:-1]
        assert command == [b"-P", b"-m", b"sgl_diffusion.orchestrator.stage_process"]
        assert listening(worker) == 0

    play(scenario)


def listening(pid: int) -> int:
    """Sockets of a process that somebody could connect to, of any family."""
    inodes = {
        os.readlink(fd)[8:-1]
        for fd in Path(f"/proc/{pid}/fd").iterdir()
        if os.readlink(fd).startswith("socket:")
    }
    found = 0
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            found += line.split()[9] in inodes
    for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]:
        columns = line.split()
        accepts = int(columns[3], 16) & 0x10000  # __SO_ACCEPTCON
        found += columns[6] in inodes and bool(accepts or len(columns) > 7)
    return found


def test_an_interrupt_at_the_terminal_reaches_only_the_server() -> None:
    server = run("""
        import asyncio, signal
        from tests.orchestrator.play import children, small_app
        from sgl_diffusion.orchestrator.coordinator import Coordinator

        async def main():
            coordinator = Coordinator(small_app())
            await coordinator.start()
            await coordinator.ready()
            job = await coordinator.submit({"steps": 30, "sleep": 0.02})
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, print, "interrupted")
            print("running", flush=True)
            await job.result()
            print(coordinator.health().restarts, flush=True)
            await coordinator.stop()

        asyncio.run(main())
    """)
    with server:
        assert server.stdout.readline() == "running\n"
        os.killpg(server.pid, signal.SIGINT)
        assert server.stdout.read().split() == ["interrupted", "0"]
    assert server.returncode == 0
