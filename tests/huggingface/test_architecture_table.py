"""The page of architectures says what the tests and `split_refusals` say."""

from architecture_table import PAGE, page


def test_the_page_is_as_it_would_be_written():
    assert PAGE.read_text() == page()
