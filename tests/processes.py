"""Processes that tests start: forked from one that has imported torch and ours, which takes each new one seconds."""

import multiprocessing

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.router.serving", "pregate.router.paths.actor", "benchmarks.echo"])
