"""`fetch-sprites`: the emoji pictures of the small worlds, out of the npm package that carries them."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--package", help="the package's .tgz, if you have it; default: have npm fetch it (74 MB)")
    parser.add_argument("--out", help="folder for the pictures; default: $LUMOS_SPRITES, or lumos/sprites in the cache folder")


def run(args: argparse.Namespace) -> None:
    import subprocess
    import tarfile
    import tempfile
    import zlib
    from pathlib import Path

    from lumos.data.sprites import PACKAGE, SPRITES, folder
    from lumos.errors import RunError, UserError
    from lumos.files import check_writable, write_bytes

    out = Path(args.out) if args.out else folder()
    wanted = {f"package/img/google/64/{code}.png": f"{name}.png" for name, code in SPRITES.items()}
    for name in wanted.values():
        check_writable(out / name)
    with tempfile.TemporaryDirectory() as temporary:
        if args.package:
            package = Path(args.package)
            if not package.is_file():
                raise UserError(f"--package {package} is no file; leave it out to have npm fetch {PACKAGE}")
        else:
            try:
                subprocess.run(["npm", "pack", PACKAGE, "--loglevel=error"], cwd=temporary, check=True, stdout=subprocess.DEVNULL)
            except FileNotFoundError:
                raise UserError(f"npm is not installed; fetch {PACKAGE} elsewhere and give its .tgz as --package") from None
            except subprocess.CalledProcessError as error:
                raise RunError(f"npm could not fetch {PACKAGE} (exit {error.returncode}, see above)") from error
            package = next(Path(temporary).glob("*.tgz"), None)
            if package is None:
                raise RunError(f"npm ended well but left no .tgz of {PACKAGE}; fetch it elsewhere and give it as --package")
        found = {}
        try:
            with tarfile.open(package) as archive:
                for member in archive:
                    if member.name in wanted and member.isfile() and member.size < 1 << 20:
                        found[wanted[member.name]] = archive.extractfile(member).read()
        except (tarfile.TarError, zlib.error, OSError, EOFError) as error:
            raise UserError(f"{package} cannot be read as a .tgz: {error}") from error
    missing = sorted(set(wanted.values()) - set(found))
    if missing:
        raise UserError(f"{package} lacks the pictures {', '.join(missing)}; it should be {PACKAGE}")
    for name, content in found.items():
        write_bytes(out / name, content)
    print(f"{len(found)} pictures in {out}\nNoto Emoji, Google, Apache License 2.0; packaged by Cal Henderson, MIT License")
