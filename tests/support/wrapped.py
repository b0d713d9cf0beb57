"""What stands in for a method as wrapt does, by which OpenTelemetry and Datadog trace."""

from __future__ import annotations

from typing import Any


class Wrapped:
    """Calls ``method``, and notes in ``called`` whose it was; has all that the method has, and is equal to it."""

    def __init__(self, method: Any, called: list[Any]) -> None:
        self.method = method
        self.called = called

    def __get__(self, instance: Any, owner: type) -> Wrapped:
        return Wrapped(self.method.__get__(instance, owner), self.called)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.called.append(self.method.__self__)
        return self.method(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def __eq__(self, other: object) -> bool:
        return bool(self.method == other)

    def __hash__(self) -> int:
        return hash(self.method)
