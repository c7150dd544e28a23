"""The script that Streamlit runs for every visitor, at every click."""

import sys

from web_chat.page import main

main(sys.argv[1:])
