"""The page: Streamlit runs `show` from top to bottom at every click."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Generator, Sequence
from uuid import uuid4

import streamlit as st

from web_chat.backend import Backend, BackendError, Settings
from web_chat.events import Code, Event, Result, Text, check_png
from web_chat.history import Conversation, Turn
from web_chat.options import open_backend, parse_args

REDRAW = 0.05
"""Seconds between two drawings of a text that grows; also how soon Stop is noticed."""


@st.cache_resource(show_spinner='Loading the model')
def shared_backend(argv: tuple[str, ...]) -> Backend:
    """The one backend of all pages that this process serves."""
    return open_backend(parse_args(argv))


def main(argv: Sequence[str]) -> None:
    """Show the page over what the command line names, or why that is not there."""
    st.set_page_config(page_title='internlm_mm chat', page_icon='💬')
    try:
        backend = shared_backend(tuple(argv))
    except Exception as error:
        st.error(sentence(error))
        st.button('Try again')
        return
    show(backend)


def show(backend: Backend) -> None:
    """The page of one visitor: conversations at the side, the current one in the middle."""
    state = st.session_state
    if 'conversations' not in state:
        state.conversations = {}
        add_conversation()
    conversation: Conversation = state.conversations[state.current]
    # A click begins a run of this script at once; the one that was writing ends when it notices.
    conversation.interrupt()
    waiting = conversation.waiting
    busy = waiting is not None
    with st.sidebar:
        show_conversations(conversation, backend.name, busy)
        settings = show_settings(backend, busy)
    for turn in conversation.turns:
        if turn is not waiting:
            show_turn(turn)
    if conversation.turns and conversation.turns[-1].state in ('failed', 'stopped'):
        st.button('Try again', on_click=conversation.retry)
    st.chat_input('Your message', key='message', on_submit=ask, disabled=busy)
    if waiting is not None:
        write_answer(backend, conversation, waiting, settings)
        st.rerun()  # and every control works again


def show_conversations(conversation: Conversation, model: str, busy: bool) -> None:
    """Which conversation, and what may be done with it."""
    state = st.session_state
    st.header('internlm_mm', anchor=False)
    st.caption(model)
    st.button('New conversation', on_click=add_conversation, disabled=busy, width='stretch')
    conversations: dict[str, Conversation] = state.conversations
    st.selectbox(
        'Conversation',
        list(conversations),
        format_func=lambda name: conversations[name].title,
        key='current',
        disabled=busy,
    )
    left, right = st.columns(2)
    left.button('Delete', on_click=delete_conversation, disabled=busy, width='stretch')
    right.download_button(
        'Export',
        conversation.export(model),
        file_name=file_name(conversation.title),
        mime='application/json',
        on_click='ignore',
        disabled=busy or not conversation.turns,
        width='stretch',
    )
    key = f'system_{state.current}'
    if key not in state:  # Streamlit forgets a control that was not shown
        state[key] = conversation.system
    conversation.system = st.text_area('System prompt', key=key, disabled=busy)


def show_settings(backend: Backend, busy: bool) -> Settings:
    """How answers are drawn."""
    default = Settings()
    template = None
    if backend.templates:
        place = list(backend.templates).index(backend.template) if backend.template else 0
        template = st.selectbox('Template', backend.templates, place, key='template', disabled=busy)
    with st.expander('Sampling', expanded=True):
        temperature = st.slider(
            'Temperature', 0.0, 2.0, default.temperature, 0.05, key='temperature', disabled=busy
        )
        top_p = st.slider('Top p', 0.05, 1.0, default.top_p, 0.05, key='top_p', disabled=busy)
        top_k = st.number_input('Top k (0: all)', 0, None, 0, key='top_k', disabled=busy)
        penalty = st.slider(
            'Repetition penalty',
            1.0,
            2.0,
            default.repetition_penalty,
            0.01,
            key='repetition_penalty',
            disabled=busy,
        )
        longest = st.number_input(
            'Most new tokens', 1, None, default.max_new_tokens, key='max_new_tokens', disabled=busy
        )
        stop = st.text_area('Stop strings, one a line', key='stop_strings', disabled=busy)
    return Settings(
        temperature=temperature,
        top_p=top_p,
        top_k=int(top_k) or None,
        repetition_penalty=penalty,
        max_new_tokens=int(longest),
        stop=tuple(line for line in stop.splitlines() if line),
        template=template,
    )


def show_turn(turn: Turn) -> None:
    """A question and what came of it."""
    with st.chat_message('user'):
        st.text(turn.question)  # as it was typed: a dollar begins no formula
    with st.chat_message('assistant'):
        for part in turn.parts:
            show_part(part)
        if turn.state == 'failed':
            st.error(turn.error)
        elif turn.state == 'stopped':
            st.caption('Stopped.')
        elif not turn.parts:
            st.caption('An empty answer.')


def show_part(part: Event) -> None:
    """One part of an answer: text, a program, or what it gave."""
    match part:
        case Text(text):
            st.markdown(text)
        case Code(source):
            st.code(source, language='python')
        case Result(text, images):
            if text:
                st.code(text, language=None)
            for image in images:
                show_image(image)


def show_image(image: bytes) -> None:
    """An image, or why it is not shown."""
    try:
        check_png(image)
        st.image(image)
    except (ValueError, OSError) as error:
        st.caption(f'Left out: {error}')


def write_answer(
    backend: Backend, conversation: Conversation, turn: Turn, settings: Settings
) -> None:
    """Show an answer as it comes and keep it, however it ends."""
    with st.chat_message('user'):
        st.text(turn.question)
    with st.chat_message('assistant'):
        answer = st.container()
        st.button('Stop', key='stop')  # what any click does: see `show`
    messages = conversation.messages()
    if not turn.begin():
        return
    try:
        events = backend.answer(messages, settings)
        with answer, contextlib.closing(events):
            draw_events(events, turn)
        turn.finish()
    except Exception as error:
        turn.fail(sentence(error))
    except BaseException:  # Streamlit's way to end a run: Stop, or the visitor has left
        turn.stop()
        raise


def draw_events(events: Generator[Event], turn: Turn) -> None:
    """Draw events where the script stands, and add them to the turn, as long as it is ours."""
    place = st.empty()
    drawn = 0.0
    for event in events:
        turn.add(event)
        if turn.state != 'writing':
            return
        if not isinstance(event, Text):
            show_part(event)
            place = st.empty()
            continue
        if time.monotonic() - drawn >= REDRAW:
            text = turn.parts[-1].text if turn.parts and isinstance(turn.parts[-1], Text) else ''
            place.markdown(text or '…')
            drawn = time.monotonic()


def ask() -> None:
    """Begin a turn with what was typed."""
    state = st.session_state
    state.conversations[state.current].ask(state.message or '')


def add_conversation() -> None:
    """Begin a conversation, under the system prompt of the one before it."""
    state = st.session_state
    system = state.conversations[state.current].system if state.conversations else ''
    state.current = uuid4().hex
    state.conversations[state.current] = Conversation(system)


def delete_conversation() -> None:
    """Forget the conversation; the newest of the others follows it."""
    state = st.session_state
    del state.conversations[state.current]
    if state.conversations:
        state.current = list(state.conversations)[-1]
    else:
        add_conversation()


def file_name(title: str) -> str:
    """A title as the name of a JSON file."""
    return (re.sub(r'\W+', '_', title).strip('_') or 'conversation') + '.json'


def sentence(error: Exception) -> str:
    """An error as one line for the visitor; what nobody expected goes to the log in full."""
    text = str(error).strip().split('\n')[0][:500]
    if isinstance(error, (BackendError, ValueError, OSError)) and text:
        return text
    logging.getLogger('web_chat').error('an answer failed', exc_info=error)
    return f'{type(error).__name__}: {text}' if text else type(error).__name__
