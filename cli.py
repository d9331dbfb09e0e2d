"""The command line: `python cli.py {fit,validate,test,predict} --config configs/NAME.yaml`."""

from lightning_ire.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
