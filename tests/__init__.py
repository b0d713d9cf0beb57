"""The tests of tornado_proxy; README.md says what is where."""
