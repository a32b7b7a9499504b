"""What `lobra demo` needs beside the ordinary commands: real text, a tokenizer, a small base, a run config."""
