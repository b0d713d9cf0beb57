"""Content codings undone in bounded steps."""

import gzip
import itertools
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tornado_proxy import decoding
from tornado_proxy.decoding import DecodingError, decode_whole, decoder_for

LIMIT = 64 * 1024
# brotli rounds up to its next block.
MOST = 96 * 1024

MEGABYTES = 64


def deflate(data, wbits):
    compressor = zlib.compressobj(wbits=wbits)
    return compressor.compress(data) + compressor.flush()


def brotli(data):
    return pytest.importorskip("brotli").compress(data, quality=5)


def zstd(data):
    return pytest.importorskip("backports.zstd").compress(data)


ENCODERS = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "deflate, without its header": lambda data: deflate(data, -15),
    "br": brotli,
    "zstd": zstd,
    "gzip, br": lambda data: brotli(gzip.compress(data)),
    "deflate, gzip, identity": lambda data: gzip.compress(zlib.compress(data)),
}


def name_of(encoder):
    return "deflate" if encoder == "deflate, without its header" else encoder


def decoded(name, pieces, limit=LIMIT):
    """Return what the pieces are, decoded in steps of which none is larger than it may be."""
    decoder = decoder_for(name)
    out = bytearray()
    for piece in pieces:
        assert decoder.needs_input
        step = decoder.decode(piece, limit)
        out += step
        while not decoder.needs_input:
            assert len(step) <= max(limit, MOST)
            step = decoder.decode(b"", limit)
            out += step
    decoder.end()
    return bytes(out)


def split(data, cuts):
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


@pytest.mark.parametrize("encoder", ENCODERS)
class TestEveryCoding:
    @given(data=st.binary(max_size=2000), cuts=st.lists(st.integers(0, 5000), max_size=20))
    def test_is_undone_wherever_it_is_split(self, encoder, data, cuts):
        encoded = ENCODERS[encoder](data)
        assert decoded(name_of(encoder), split(encoded, cuts)) == data

    def test_is_undone_byte_by_byte_in_steps_of_one_byte(self, encoder):
        data = b"hello, hello, hello" * 20
        encoded = ENCODERS[encoder](data)
        assert decoded(name_of(encoder), [encoded[i : i + 1] for i in range(len(encoded))], limit=1) == data

    @pytest.mark.parametrize("missing", [1, 5])
    def test_cut_short_is_an_error(self, encoder, missing):
        encoded = ENCODERS[encoder](b"hello" * 100)
        with pytest.raises(DecodingError, match="cut short"):
            decoded(name_of(encoder), [encoded[:-missing]])

    def test_garbage_is_an_error(self, encoder):
        with pytest.raises(DecodingError, match="not a valid"):
            decoded(name_of(encoder), [b"\xffthis is no encoded body at all, is it" * 10])

    def test_an_empty_body_stays_empty(self, encoder):
        assert decoded(name_of(encoder), []) == b""
        assert decoded(name_of(encoder), [b""]) == b""

    def test_a_bomb_comes_in_small_steps(self, encoder):
        encoded = ENCODERS[encoder](bytes(MEGABYTES << 20))
        assert len(encoded) < (MEGABYTES << 20) // 100
        decoder = decoder_for(name_of(encoder))
        size, steps = 0, 0
        for start in range(0, len(encoded), LIMIT):
            step = decoder.decode(encoded[start : start + LIMIT], LIMIT)
            while step or not decoder.needs_input:
                assert len(step) <= MOST
                size += len(step)
                steps += 1
                step = decoder.decode(b"", LIMIT)
        decoder.end()
        assert size == MEGABYTES << 20
        assert steps >= size // MOST

    def test_is_undone_as_a_whole(self, encoder):
        data = b"abc" * 500_000
        assert decode_whole(decoder_for(name_of(encoder)), ENCODERS[encoder](data), None) == data

    def test_as_a_whole_it_may_not_be_larger_than_agreed(self, encoder):
        with pytest.raises(DecodingError, match="larger than 1000 bytes"):
            decode_whole(decoder_for(name_of(encoder)), ENCODERS[encoder](b"abc" * 500_000), 1000)


class TestSeveralParts:
    """A body may be made of several that are whole in themselves."""

    @given(parts=st.lists(st.binary(max_size=50), min_size=1, max_size=6), cuts=st.lists(st.integers(0, 500)))
    def test_members_of_gzip_are_joined(self, parts, cuts):
        encoded = b"".join(map(gzip.compress, parts))
        assert decoded("gzip", split(encoded, cuts)) == b"".join(parts)

    @given(parts=st.lists(st.binary(max_size=50), min_size=1, max_size=6), cuts=st.lists(st.integers(0, 500)))
    def test_frames_of_zstd_are_joined(self, parts, cuts):
        encoded = b"".join(map(zstd, parts))
        assert decoded("zstd", split(encoded, cuts)) == b"".join(parts)

    def test_zeros_behind_gzip_are_nothing(self):
        assert decoded("gzip", [gzip.compress(b"a") + bytes(512), bytes(10)]) == b"a"

    @pytest.mark.parametrize("encoder", ["gzip", "deflate", "br", "zstd"])
    def test_garbage_behind_the_end_is_an_error(self, encoder):
        with pytest.raises(DecodingError):
            decoded(encoder, [ENCODERS[encoder](b"a"), b"\xffgarbage"])

    def test_a_second_member_that_is_cut_short_is_an_error(self):
        with pytest.raises(DecodingError, match="cut short"):
            decoded("gzip", [gzip.compress(b"a") + gzip.compress(b"b")[:-4]])

    def test_thousands_of_empty_members_are_one_step(self):
        assert decoded("gzip", [gzip.compress(b"") * 3000 + gzip.compress(b"a")]) == b"a"


class TestNames:
    @pytest.mark.parametrize("value", ["", "identity", " Identity ,, "])
    def test_nothing_to_undo(self, value):
        assert decoder_for(value) is None

    def test_case_and_spaces_do_not_matter(self):
        assert decode_whole(decoder_for("\tGZip , identity"), gzip.compress(b"a"), None) == b"a"

    @pytest.mark.parametrize("value", ["compress", "gzip, exi", "gzip;q=1"])
    def test_an_unknown_one_is_named(self, value):
        with pytest.raises(DecodingError, match="is not one of gzip, deflate, br and zstd"):
            decoder_for(value)

    def test_too_many_are_refused(self):
        with pytest.raises(DecodingError, match="5 content codings"):
            decoder_for(", ".join(["gzip"] * 5))

    @pytest.mark.parametrize(("coding", "package"), [("br", "brotli>=1.2"), ("zstd", "backports.zstd")])
    def test_a_library_that_is_missing_is_named(self, coding, package, monkeypatch):
        def missing(name):
            raise ImportError(name)

        monkeypatch.setattr(decoding.importlib, "import_module", missing)
        with pytest.raises(DecodingError, match=f"'{coding}' needs a library: pip install '{package}'"):
            decoder_for(coding)

    def test_a_brotli_that_cannot_be_bounded_is_refused(self, monkeypatch):
        class Old:
            Decompressor = object
            error = Exception

        monkeypatch.setattr(decoding.importlib, "import_module", lambda name: Old)
        with pytest.raises(DecodingError, match="newer brotli"):
            decoder_for("br")

    def test_a_zstd_window_of_more_than_8_megabytes_is_refused(self):
        library = pytest.importorskip("backports.zstd")
        options = {library.CompressionParameter.window_log: 24, library.CompressionParameter.compression_level: 3}
        encoder = library.ZstdCompressor(options=options)
        encoded = encoder.compress(bytes(100)) + encoder.flush()
        with pytest.raises(DecodingError, match="not a valid zstd body"):
            decode_whole(decoder_for("zstd"), encoded, None)
