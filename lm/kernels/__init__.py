"""Operations worth their own kernel: a folder each, with its reference and the choice."""
