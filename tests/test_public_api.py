"""What users import, and the contract of the options: names and defaults."""

import dataclasses

import pytest
from tornado.web import RequestHandler

import tornado_proxy
from tornado_proxy import ProxyHandler, ProxyMixin, ProxyOptions
from tornado_proxy.mixin import HOOKS

DEFAULTS = {
    "client": None,
    "client_options": {},
    "response_mode": "stream",
    "stream_headers_mode": "replace",
    "buffer_headers_mode": "prepend",
    "normalize_headers": None,
    "preserve_host_header": False,
    "custom_http_methods": (),
    "status_callbacks": {},
    "error_callback": None,
    "rewrite_request": None,
    "rewrite_response": None,
    "filter_request_body": None,
    "filter_response_body": None,
    "on_done": None,
    "retries": 1,
    "should_retry": None,
    "connect_timeout": 10,
    "response_timeout": 60,
    "idle_timeout": 300,
    "total_timeout": None,
    "write_timeout": 60,
    "max_body_size": None,
    "max_buffered_response": 64 * 1024 * 1024,
    "buffer_size": 256 * 1024,
    "forwarded": "x-forwarded",
    "trusted_proxies": (),
    "via": "tornado_proxy",
    "rewrite_location": True,
    "cookie_domain": None,
    "cookie_path": None,
    "websocket": True,
    "allowed_origins": None,
    "tunnel_idle_timeout": None,
}


class TestNames:
    def test_everything_in_all_exists(self):
        assert [name for name in tornado_proxy.__all__ if not hasattr(tornado_proxy, name)] == []

    def test_all_is_sorted_and_unique(self):
        assert sorted(set(tornado_proxy.__all__)) == sorted(tornado_proxy.__all__)


class TestOptions:
    def test_names_and_defaults_are_the_contract(self):
        options = ProxyOptions.parse("test", {"upstream": "http://127.0.0.1:9000"})
        fields = [field.name for field in dataclasses.fields(options) if field.init and field.name != "upstream"]
        assert {name: getattr(options, name) for name in fields} == DEFAULTS

    @pytest.mark.parametrize("field", [f for f in dataclasses.fields(ProxyOptions) if f.init], ids=lambda f: f.name)
    def test_each_has_one_line_of_help(self, field):
        assert field.metadata["help"]
        assert "\n" not in field.metadata["help"]


class TestHooks:
    def test_there_are_nine(self):
        assert len(HOOKS) == 9

    @pytest.mark.parametrize("name", HOOKS)
    def test_each_is_a_documented_method(self, name):
        assert getattr(ProxyHandler, name).__doc__
        assert getattr(ProxyMixin, name) is getattr(ProxyHandler, name)


class TestMixin:
    def test_it_overrides_nothing_of_tornados(self):
        own = {name for name in vars(ProxyMixin) if not name.startswith("__")}
        assert [name for name in own if hasattr(RequestHandler, name)] == []
