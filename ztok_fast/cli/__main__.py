from ztok_fast.cli.main import main

raise SystemExit(main())
