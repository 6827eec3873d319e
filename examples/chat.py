"""Chat with the shelf that `make serve` keeps up; needs only the `openai` package."""

import sys

from openai import OpenAI


def main() -> None:
    question = " ".join(sys.argv[1:]) or "Why is the sky blue? Answer in two sentences."
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none-needed")
    stream = client.chat.completions.create(
        model="chat", messages=[{"role": "user", "content": question}], max_tokens=120, stream=True
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
