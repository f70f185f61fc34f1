"""A thread of TensorBoard's that meets a full disk leaves no traceback beside the error."""

import errno
import threading

from scalelong_fast import cli


def in_a_thread(error):
    def fail():
        raise error

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()


def test_a_full_disk_is_quiet_and_other_errors_are_not(capfd):
    before = threading.excepthook
    shown = []
    threading.excepthook = lambda args: shown.append(args.exc_type)
    try:
        with cli._quiet_threads():
            in_a_thread(OSError(errno.ENOSPC, "No space left on device"))
            assert shown == []
            in_a_thread(ValueError("a bug"))
            assert shown == [ValueError]
        in_a_thread(OSError(errno.ENOSPC, "outside"))
        assert shown == [ValueError, OSError]
    finally:
        threading.excepthook = before
    assert capfd.readouterr().err == ""
