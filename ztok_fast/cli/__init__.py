"""The ``ztok`` command."""
