"""Applications in a browser, behind a prefix: JupyterLab, Streamlit, marimo and Vite by websocket, Gradio by events.

They start slowly, so they run only when asked for, each where its command is found::

    PATH="$PATH:/jupyter/bin:/vite/node_modules/.bin" TORNADO_PROXY_APPS=1 pytest tests/real/applications

``TORNADO_PROXY_PICTURES=/tmp`` keeps a picture of each page.
"""
