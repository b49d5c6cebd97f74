"""Fine-tuning by trl, and what protects earlier tasks."""
