"""The list of metrics: names that Prometheus, vLLM's dashboards and Ray's exporter can all take."""

import re

import pytest

from pregate.base.metrics import BY_STEM, METRICS, OF_ENGINE, OF_NEXT_ENGINE


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.stem)
def test_names_are_prometheus_own_and_carry_no_colon(metric):
    assert re.fullmatch(r"pregate_[a-z][a-z0-9_]*", metric.name)
    assert (metric.kind == "counter") == metric.name.endswith("_total")
    assert not metric.name.endswith(("_bucket", "_sum", "_count"))
    assert (metric.kind == "histogram") == bool(metric.buckets)
    assert list(metric.buckets) == sorted(set(metric.buckets))
    assert metric.help.endswith(".")


def test_each_is_there_once_and_those_of_vllm_have_its_stems():
    assert len(BY_STEM) == len(METRICS)
    vllms = "time_to_first_token_seconds inter_token_latency_seconds e2e_request_latency_seconds prompt_tokens_total"
    vllms += " generation_tokens_total request_success_total num_requests_running num_requests_waiting"
    vllms += " kv_cache_usage_perc num_preemptions_total request_queue_time_seconds request_prefill_time_seconds"
    assert set(vllms.split()) <= set(BY_STEM)


def test_what_hosts_count_themselves_is_the_first_engine_s_to_say():
    """It reaches every engine, and who adds engines up would count it once for each."""
    asked = {metric.stem for metric in METRICS if metric.read is not None} - {"num_requests_waiting_for_paths"}
    first, others = ({metric.stem for metric in metrics} for metrics in (OF_ENGINE, OF_NEXT_ENGINE))
    assert first == asked and others < first
    assert {
        "expert_cache_hits_total",
        "expert_read_bytes_total",
        "expert_host_up",
        "num_expert_hosts",
    } <= first - others
    assert {"steps_total", "expert_rows_total", "dispatch_wait_seconds_total", "engine_up"} <= others
