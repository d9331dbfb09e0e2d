"""The command line: `python cli.py {fit,validate,test,predict,sweep,compare,find,barrier} --config FILE`."""

if __name__ == "__main__":
    try:
        from lightning_ire.cli import main

        raise SystemExit(main())
    except KeyboardInterrupt:  # while Lightning was being imported
        raise SystemExit(130) from None
