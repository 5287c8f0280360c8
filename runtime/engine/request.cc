#include "runtime/engine/request.h"

#include "runtime/engine/inbox.h"

namespace thermocline {

void RequestHandle::cancel() {
  if (cancel_.exchange(true)) return;
  if (const std::shared_ptr<Inbox> inbox = inbox_.lock()) inbox->wake();
}

}  // namespace thermocline
