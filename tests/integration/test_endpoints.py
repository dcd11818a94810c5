"""``/treespec/clear``: where it is, who may ask, and what is seen at once."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from vllm_treespec.integration.endpoint_plugin import wrap_load_endpoint_plugins
from vllm_treespec.integration.metrics import TreeProm

TREE = {"method": "treespec"}


class Client:
    """An engine's client with one Prometheus logger."""

    def __init__(self):
        self.asked = []
        self.value = 7
        prom = object.__new__(TreeProm)
        prom._metrics = {"suffix_cached_tokens": (None, {0: [self], 1: [self]})}
        logger = SimpleNamespace(spec_decoding_prom=prom)
        self.logger_manager = SimpleNamespace(stat_loggers=[SimpleNamespace(), logger])

    async def collective_rpc(self, method):
        self.asked.append(method)

    def set(self, value):
        assert self.asked, "nothing was forgotten yet"
        self.value = value


def post(client, keys=None, speculative=TREE, spec_method=None, **headers):
    app = FastAPI()
    app.state.engine_client = client
    app.state.args = Namespace(
        api_key=keys, speculative_config=speculative, spec_method=spec_method
    )
    for plugin in wrap_load_endpoint_plugins(lambda tasks: [])(("generate",)):
        plugin.attach_router(app)
    return TestClient(app).post("/treespec/clear", headers=headers).status_code


def test_it_clears_and_the_gauge_is_zero_at_once():
    client = Client()
    assert post(client) == 200
    assert client.asked == ["treespec_clear"] and client.value == 0


@pytest.mark.parametrize("by", ["flag", "environment"])
def test_it_obeys_the_servers_key(by, monkeypatch):
    keys = ["one", "two"] if by == "flag" else None
    if by == "environment":
        monkeypatch.setenv("VLLM_API_KEY", "two")
    client = Client()
    for headers in ({}, {"Authorization": "Bearer three"}, {"Authorization": "two"}):
        assert post(client, keys, **headers) == 401
    assert not client.asked and client.value == 7
    assert post(client, keys, Authorization="Bearer two") == 200
    assert client.asked


def test_it_is_there_only_where_trees_were_asked_for():
    assert post(Client(), speculative=None) == 404
    assert post(Client(), speculative={"method": "ngram"}) == 404
    assert post(Client(), speculative=None, spec_method="treespec") == 200


def test_others_endpoints_are_kept_and_servers_that_do_not_generate_left_alone():
    load = wrap_load_endpoint_plugins(lambda tasks: ["another"])
    assert load(("generate",))[0] == "another" and len(load(("generate",))) == 2
    assert load(("render",)) == load(None) == ["another"]
