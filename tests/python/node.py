"""A node in a process of its own, and what the tests ask of it. No channel has options: gRPC is as it comes."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time

import grpc

import kv_pb2
import kv_pb2_grpc
import replication_pb2 as wire
import replication_pb2_grpc

QUORATE = os.environ["QUORATE"]
DEADLINE_S = 60


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def eventually(found, what):
    """What `found` returns, as soon as it is something."""
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        if result := found():
            return result
        time.sleep(0.02)
    raise AssertionError(f"not within {DEADLINE_S} s: {what}")


class Node:
    def __init__(self, *arguments):
        self.arguments = arguments
        self.directory = tempfile.mkdtemp(prefix="quorate-python-")
        self.data = os.path.join(self.directory, "data")
        # Another process may take a port before the node does.
        for attempt in range(5):
            self.client, self.peer, self.frames = (f"127.0.0.1:{port}" for port in free_ports(3))
            try:
                self.start()
                return
            except ChildProcessError as error:
                if attempt == 4:
                    self.remove()
                    raise error

    def start(self):
        addresses = ["--client-listen", self.client, "--peer-listen", self.peer, "--frames-listen", self.frames]
        command = [QUORATE, "serve", "--single", "--data-dir", self.data, *addresses, *self.arguments]
        with open(os.path.join(self.directory, "log"), "ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.channel = grpc.insecure_channel(self.client)
        self.kv = kv_pb2_grpc.KvStub(self.channel)
        self.feed = replication_pb2_grpc.ReplicationServiceStub(self.channel)
        eventually(self.is_healthy, "the node is healthy")

    def is_healthy(self):
        if self.process.poll() is not None:
            raise ChildProcessError(self.log())
        try:
            return self.feed.GetStatus(wire.StatusRequest(), timeout=5).healthy
        except grpc.RpcError:
            # Until the next attempt the channel would wait for longer and longer.
            self.channel.close()
            self.channel = grpc.insecure_channel(self.client)
            self.kv = kv_pb2_grpc.KvStub(self.channel)
            self.feed = replication_pb2_grpc.ReplicationServiceStub(self.channel)
            return False

    def log(self):
        with open(os.path.join(self.directory, "log")) as log:
            return log.read()

    def end(self, how=signal.SIGTERM):
        self.process.send_signal(how)
        self.process.wait(DEADLINE_S)
        # Only now: what is open on it is to learn why the node has ended it.
        self.channel.close()

    def remove(self):
        if self.process.poll() is None:
            self.end(signal.SIGKILL)
        shutil.rmtree(self.directory)

    def status(self):
        return self.feed.GetStatus(wire.StatusRequest(present=True), timeout=DEADLINE_S)

    def put(self, key, value, collection="", tenant="", ttl_ms=0):
        request = kv_pb2.PutRequest(tenant=tenant, collection=collection, key=key, value=value, ttl_ms=ttl_ms)
        return self.kv.Put(request, timeout=DEADLINE_S).revision

    def txn(self, operations, tenant=""):
        request = kv_pb2.TxnRequest(tenant=tenant, success=operations)
        return self.kv.Txn(request, timeout=DEADLINE_S).revision

    def items(self, tenant, collection):
        """What `Range` says of a collection, page by page."""
        request = kv_pb2.RangeRequest(tenant=tenant, collection=collection)
        items = {}
        while True:
            page = self.kv.Range(request, timeout=DEADLINE_S)
            items.update((item.key, item) for item in page.items)
            if not page.next:
                return items
            request.start = page.next

    def entries(self, after=0, limit=0, filters=()):
        """Everything that `GetEntriesAfter` has, page by page."""
        entries = []
        while True:
            request = wire.EntriesRequest(after_seq=after, limit=limit, filters=filters)
            page = self.feed.GetEntriesAfter(request, timeout=DEADLINE_S)
            entries += page.entries
            after = page.upto_seq
            if not page.more:
                return entries


class BreakingLine:
    """Passes connections on to `address`. The first ones are cut, each after as many bytes back as `limits` say."""

    def __init__(self, address, limits):
        host, port = address.split(":")
        self.target, self.limits, self.connections, self.ends = (host, int(port)), list(limits), 0, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.threads = [threading.Thread(target=self.accept)]
        self.threads[0].start()

    def accept(self):
        # Until the listener is shut down.
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                node = socket.create_connection(self.target)
                self.ends += [client, node]
                limit = self.limits[self.connections] if self.connections < len(self.limits) else None
                self.connections += 1
                for ends in [(client, node, None), (node, client, limit)]:
                    self.threads.append(threading.Thread(target=self.carry, args=ends))
                    self.threads[-1].start()

    @staticmethod
    def carry(source, sink, limit):
        with contextlib.suppress(OSError):
            while data := source.recv(min(limit or 65536, 65536)):
                sink.sendall(data)
                if limit is not None:
                    limit -= len(data)
                    if limit == 0:
                        break
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self):
        for end in [self.listener, *self.ends]:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(DEADLINE_S)
        for end in [self.listener, *self.ends]:
            end.close()
