"""Follows a node of quorate by frames over TCP, with nothing but Python: prints what is applied, and acknowledges it.

    python frames.py 127.0.0.1:7811 [SEQ@HISTORY]    # a node's frames_listen, and how the last line began that was printed before
"""

import io
import socket
import struct
import sys
import zlib

BEGIN, ENTRIES, HEARTBEAT, END = 0, 1, 5, 6  # docs/FORMAT.md has every byte; 2 to 4 are a state, which is not asked for here.
OPERATIONS = ["", "insert", "update", "delete", "expire", "command"]


def numbers(data, form):
    return struct.unpack("<" + form, data.read(struct.calcsize("<" + form)))


def text(data):
    return data.read(*numbers(data, "Q"))


def frame(message):
    return struct.pack("<II", 4 + len(message), zlib.crc32(message)) + message


def follow(address, seq, history):
    with socket.create_connection(address, timeout=15) as node:  # A heartbeat comes every 5 s.
        ways, window = (False, False, True, False), 1 << 20  # From seq on, without a state, batched, not compressed.
        first = struct.pack("<I8sIQQ????QI", 0, b"QFRAMES\0", 1, seq, history, *ways, window, 5000)
        node.sendall(frame(first + struct.pack("<Q4sQ", 4, b"demo", 0)))  # Its name, and no filters.
        incoming, lines = node.makefile("rb"), []
        while head := incoming.read(8):
            (length, checksum), taken = struct.unpack("<II", head), 0
            message = io.BytesIO(incoming.read(length - 4))
            assert zlib.crc32(message.getbuffer()) == checksum, "a frame is damaged, or broke off"
            (kind,) = numbers(message, "I")
            if kind == BEGIN:
                history = numbers(message, "8sIQIQ")[2]
            elif kind == ENTRIES:
                (_, count, _), entries = numbers(message, "IIQ"), io.BytesIO(text(message))
                for _ in range(count):
                    seq, _, time_ms, _, more, operation = numbers(entries, "QQQQ?I")
                    before, parts, behind = ("II", 1, "") if OPERATIONS[operation] == "command" else ("", 4, "QQQQQI")
                    what = *numbers(entries, before), *(text(entries) for _ in range(parts)), *numbers(entries, behind)
                    lines.append(f"{seq}@{history:016x} {time_ms} {OPERATIONS[operation]} {what}")
                    if not more:  # That is all of the position, and it is taken.
                        print(*lines, sep="\n", flush=True)
                        taken, lines = seq, []
            elif kind == HEARTBEAT:
                (taken,) = numbers(message, "Q")
            elif kind == END:
                sys.exit("{1}: {2}".format(numbers(message, "I"), text(message).decode(), text(message).decode()))
            if taken:
                node.sendall(frame(struct.pack("<IQ", 1, taken)))


(host, _, port), (seq, _, history) = sys.argv[1].rpartition(":"), (sys.argv[2:] or ["0"])[0].partition("@")
follow((host, int(port)), int(seq), int(history or "0", 16))
