"""One connection out of the guest: standard input and output go to a port of this machine.

Usage: forward.py FILE, where FILE holds the port now. QEMU runs one of these per connection.
Without the file, or with nobody there, the guest sees its connection end.
"""

import os
import socket
import sys
import threading


def copy(source: socket.socket, target: socket.socket) -> None:
    """Copy until the end of the stream, and pass that on."""
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        os._exit(0)  # one side is gone: end the other, too


if __name__ == "__main__":
    # It is the guest's connection, too: a traceback would arrive as data.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    guest = socket.socket(fileno=0)
    with open(sys.argv[1], encoding="ascii") as file:
        server = socket.create_connection(("127.0.0.1", int(file.read())))
    back = threading.Thread(target=copy, args=(server, guest))
    back.start()
    copy(guest, server)
    back.join()
