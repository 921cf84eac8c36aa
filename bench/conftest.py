from bench.micro.case import SETS


def pytest_addoption(parser):
    parser.addoption("--bench-set", default="quick", choices=SETS, help="shapes of the registry (default: quick)")
    parser.addoption("--bench-device", default="cpu", help="cpu (default) or cuda")
