"""Image files of a few bytes whose headers promise 30000 x 20000 pixels, in every format that OpenCV decodes."""

import io
import struct
import zlib

from PIL import Image

WIDTH = 30000
HEIGHT = 20000


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(100))
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def jpeg(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    data = file.getvalue()
    position = data.index(b"\xff\xc0") + 5
    return data[:position] + struct.pack(">HH", height, width) + data[position + 4 :]


def bmp(width: int, height: int) -> bytes:
    file_header = b"BM" + struct.pack("<IHHI", 54, 0, 0, 54)
    return file_header + struct.pack("<IiiHHIIiiII", 40, width, -height, 1, 24, 0, 0, 0, 0, 0, 0)


def tiff(width: int, height: int, order: str = "<") -> bytes:
    signature = b"II*\0" if order == "<" else b"MM\0*"
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (262, 3, 1), (273, 4, 200), (279, 4, 100)]
    directory = struct.pack(order + "IH", 8, len(tags))
    for tag, kind, value in tags:
        padded = struct.pack(order + "HH", value, 0) if kind == 3 else struct.pack(order + "I", value)
        directory += struct.pack(order + "HHI", tag, kind, 1) + padded
    return (signature + directory).ljust(400, b"\0")


def gif(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("P", (16, 16)).save(file, "GIF")
    data = file.getvalue()
    return data[:6] + struct.pack("<HH", width, height) + data[10:]


def webp_extended(width: int, height: int) -> bytes:
    sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunk = b"VP8X" + struct.pack("<I", 10) + bytes(4) + sizes
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def jpeg2000(width: int, height: int, is_bare: bool) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG2000", no_jp2=is_bare)
    data = file.getvalue()
    position = data.index(b"\xff\x4f\xff\x51") + 8
    return data[:position] + struct.pack(">II", width, height) + data[position + 8 :]


def avif(width: int, height: int) -> bytes:
    file_type = struct.pack(">I", 20) + b"ftypavif" + bytes(4) + b"avif"
    small = struct.pack(">I", 20) + b"ispe" + struct.pack(">III", 0, 64, 64)
    return file_type + small + struct.pack(">I", 20) + b"ispe" + struct.pack(">III", 0, width, height)


BOMBS = {
    "png": png(WIDTH, HEIGHT),
    "jpeg": jpeg(WIDTH, HEIGHT),
    "bmp": bmp(WIDTH, HEIGHT),
    "tiff, little endian": tiff(WIDTH, HEIGHT),
    "tiff, big endian": tiff(WIDTH, HEIGHT, ">"),
    "gif": gif(WIDTH, HEIGHT),
    "webp": webp_extended(WIDTH, HEIGHT),
    "jpeg 2000": jpeg2000(WIDTH, HEIGHT, is_bare=False),
    "jpeg 2000, bare": jpeg2000(WIDTH, HEIGHT, is_bare=True),
    "avif": avif(WIDTH, HEIGHT),
    "sun raster": struct.pack(">8I", 0x59A66A95, WIDTH, HEIGHT, 24, 0, 1, 0, 0),
    "netpbm": b"P6 # a comment 1 2\n# another\n30000\t20000\n255\n",
    "pam": b"P7\nWIDTH 30000\nHEIGHT 20000\nDEPTH 3\nMAXVAL 255\nTUPLTYPE RGB\nENDHDR\n",
    "pfm": b"PF\n30000 20000\n-1.0\n",
    "radiance": b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 20000 +X 30000\n",
}
"""Name of a format -> the bytes of a file."""
