"""``simplevla keys``."""

from __future__ import annotations

import argparse
from pathlib import Path

from simplevla.cli import Command

_EPILOG = """\
The server proves who it is, and lets in the clients whose public keys it has. Secret keys never leave the
machine they were made on; public ones may be sent by any way that nobody can change them on.

On the robot PC the trial and bring-up find their keys by SIMPLEVLA_KEYS=~/.config/simplevla/keys. A
client that is forgotten cannot connect any more; a connection it has lasts until it ends.

Pictures go sealed through a port 1000 above the server's: let a firewall pass both (5555 and 6555). Where
only the first is open they go through it too, more slowly.

examples, on the server:
  simplevla keys new server
  simplevla keys allow robot.public             after it was copied from the robot PC
  simplevla serve BUNDLE --address tcp://0.0.0.0:5555 --keys ~/.config/simplevla/keys

and on the robot PC:
  simplevla keys new robot
  simplevla keys trust server.public            after it was copied from the server
"""


def _configure(parser: argparse.ArgumentParser) -> None:
    from policy_server.keys import default_folder

    parser.epilog = _EPILOG
    parser.add_argument(
        "--folder",
        type=Path,
        default=default_folder(),
        metavar="DIR",
        help="where the keys are (default: %(default)s)",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    new = actions.add_parser("new", help="make a pair of keys for this machine")
    new.add_argument("name", metavar="NAME", help='"server" for a server, or the name of a client')
    allow = actions.add_parser("allow", help="let a client connect to this machine's server")
    allow.add_argument("file", type=Path, metavar="NAME.public", help="the client's public key")
    forget = actions.add_parser("forget", help="let a client connect no more")
    forget.add_argument("name", metavar="NAME", help="the client")
    trust = actions.add_parser("trust", help="say which server this machine's clients speak to")
    trust.add_argument("file", type=Path, metavar="server.public", help="the server's public key")
    actions.add_parser("list", help="show the clients that may connect to this machine's server")


def _run(args: argparse.Namespace) -> int:
    from policy_server import keys

    if args.action == "new":
        print(f"public key: {keys.make_keys(args.folder, args.name)}")
    elif args.action == "allow":
        print(f"may connect: {keys.allow_client(args.folder, args.file).stem}")
    elif args.action == "forget":
        keys.forget_client(args.folder, args.name)
        print(f"may not connect any more: {args.name}")
    elif args.action == "trust":
        print(f"server: {keys.trust_server(args.folder, args.file)}")
    else:
        for name in keys.known_clients(args.folder):
            print(name)
    return 0


KEYS = Command("make keys for servers and robots on different machines", _configure, _run)
