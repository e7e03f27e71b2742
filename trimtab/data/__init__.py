"""Data: files to examples (`formats`), to text (`templates`), to token rows (`encode`), to stages (`loader`)."""
