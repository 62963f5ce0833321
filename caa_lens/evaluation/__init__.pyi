from .examinees import Examinee as Examinee
from .examinees import Reply as Reply
from .chats import encode_chat as encode_chat
