"""The committed report says what the committed results say."""

from experiments import __main__ as command


def test_report_is_up_to_date():
    assert command.main(["report", "--check"]) == 0
