"""The server: `streamlit run projects/web_chat/app.py -- MODEL`, which `run.py` does for you."""

from pathlib import Path

import streamlit as st
from starlette.middleware import Middleware
from web_chat.headers import NothingFromOutside

app = st.App(Path(__file__).with_name('chat.py'), middleware=[Middleware(NothingFromOutside)])
