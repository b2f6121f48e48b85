"""Programs that turn raw text into training tokens."""
