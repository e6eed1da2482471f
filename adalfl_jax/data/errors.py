"""What is wrong with data."""


class DatasetError(ValueError):
    """Data that is missing, damaged or does not fit; the text names the file or field and says what to do."""
