"""Prints what a node of quorate applies, one JSON object per line, until Ctrl-C.

    pip install grpcio grpcio-tools grpcio-status
    python -m grpc_tools.protoc -Iproto --python_out=. --grpc_python_out=. proto/replication.proto proto/call.proto
    python follow.py 127.0.0.1:7801 --after 42@9f3c52a80d1e7b64 --id mirror

When the connection breaks it goes on where it was. Keep `seq@history` of what you have dealt with: --after goes on there.
"""

import argparse
import asyncio
import base64
import json
import sys

import grpc
from grpc_status import rpc_status

import call_pb2
import replication_pb2 as wire
import replication_pb2_grpc

FINAL = {"REASON_COMPACTED", "REASON_OTHER_HISTORY", "REASON_AHEAD", "REASON_INVALID"}  # Trying again changes nothing.
HEARTBEAT_S, SILENCE_S = 5, 15  # A node that is silent for three heartbeats is gone.


def printable(name, data):
    try:
        return {name: data.decode()}
    except UnicodeDecodeError:
        return {name + "_base64": base64.b64encode(data).decode()}


def show(entry, history):
    line = {"seq": entry.seq, "history": f"{history:016x}", "time_ms": entry.time_ms}
    line["operation"] = wire.WalOperation.Name(entry.operation).lower()
    if entry.HasField("entity"):
        line |= {"tenant": entry.tenant_id, "collection": entry.entity.collection, **printable("key", entry.entity.key)}
        if entry.operation in (wire.Insert, wire.Update):
            line |= printable("value", entry.entity.value)
    else:  # Of a machine that tells no events.
        line |= printable("command", entry.command.command)
    print(json.dumps(line))


def failure_of(error):
    """The `quorate.v1.Failure` in the details of a status, if a node has sent one."""
    status, failure = rpc_status.from_call(error), call_pb2.Failure()
    found = status is not None and any(detail.Unpack(failure) for detail in status.details)
    return failure if found else None


class Follower:
    def __init__(self, position, history, name):
        self.position, self.history, self.name = position, history, name
        self.unfinished = []  # Entries of a position of which more come. Until then they do not count.
        self.back_off_s = 0.1

    async def follow(self, address):
        """Follows until the connection breaks."""
        self.unfinished.clear()
        requests = asyncio.Queue()
        first = dict(from_seq=self.position, history=self.history, id=self.name, heartbeat_ms=HEARTBEAT_S * 1000)
        requests.put_nowait(wire.SubscribeRequest(**first, batched=True, window_bytes=1 << 20))

        async def said():
            while True:
                yield await requests.get()

        async with grpc.aio.insecure_channel(address) as channel:
            call = replication_pb2_grpc.ReplicationServiceStub(channel).Subscribe(said())
            while (message := await asyncio.wait_for(call.read(), SILENCE_S)) is not grpc.aio.EOF:
                self.take(message)
                requests.put_nowait(wire.SubscribeRequest(ack_seq=self.position))
                self.back_off_s = 0.1

    def take(self, message):
        self.history = message.history or self.history
        if message.HasField("heartbeat"):
            self.position = message.heartbeat.upto_seq
        for entry in wire.Entries.FromString(message.batch.entries).entries:
            self.history = entry.history or self.history
            self.unfinished.append(entry)
            if not entry.more:
                for whole in self.unfinished:
                    show(whole, self.history)
                self.unfinished.clear()
                self.position = entry.seq
        sys.stdout.flush()

    async def run(self, address):
        while True:
            try:
                await self.follow(address)
            except asyncio.TimeoutError:
                print(f"{address} is silent", file=sys.stderr)
            except grpc.aio.AioRpcError as error:
                failure = failure_of(error)
                reason = call_pb2.Reason.Name(failure.reason) if failure else error.code().name
                end = {"reason": reason, "message": error.details(), "after": f"{self.position}@{self.history:016x}"}
                if failure and failure.first_revision:
                    end["first_seq"] = failure.first_revision
                print(json.dumps(end), file=sys.stderr, flush=True)
                if reason in FINAL:
                    return 1
            await asyncio.sleep(self.back_off_s)
            self.back_off_s = min(self.back_off_s * 2, 5)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prints what a node of quorate applies.")
    parser.add_argument("address", metavar="HOST:PORT", help="client port of any node")
    parser.add_argument("--after", metavar="SEQ[@HISTORY]", default="0", help="begin behind this position")
    parser.add_argument("--id", default="follow.py", help="name in the node's list of followers")
    given = parser.parse_args()
    seq, _, history = given.after.partition("@")
    try:
        sys.exit(asyncio.run(Follower(int(seq), int(history or "0", 16), given.id).run(given.address)))
    except KeyboardInterrupt:
        pass
